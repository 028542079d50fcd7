from safnet_ops.reference import backward_warp, census_loss, fused_fuse, group_conv_shuffle, upsample_fuse
