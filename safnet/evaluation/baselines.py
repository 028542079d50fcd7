"""Classical ways of fusing exposures, to compare a network with.

All of them merge by SAFNet's explicit fusion (triangle weights of the reference, linear radiance). They differ in the
flows, and in whether a ghost mask withdraws what does not fit the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import safnet_ops
from safnet.calibrate import Calibration, calibrate
from safnet.data.datasets import middle_frame
from safnet.fuse import Result, fuse_threes
from safnet.model import Alignment, Fusion
from safnet.motion import Grey, equally_exposed, motion_flow
from safnet.radiance import GAMMA, exposure_ratios, ldr_values, linearize
from safnet.series import Three

Flow = npt.NDArray[np.float32]

GHOST_THRESHOLD = 0.06  # of LDR values in [0, 1]; more than noise and rounding, less than what an eye sees as a ghost
ORB_FEATURES = 4000
RANSAC_PIXELS = 3.0
FEWEST_INLIERS = 12  # a homography has 8 unknowns; with fewer witnesses the frame is left as it is


def fuse_baseline(name: str, frames: Tensor, evs: tuple[float, ...], measure: bool = False) -> Result:
    """Fuse exposures by the baseline of that name (see BASELINES), of more or fewer than three as `fuse_exposures` does.

    Args:
        frames: (N, 3, H, W) float32, LDR values in [0, 1], from dark to bright; the middle one is the reference.
        evs: exposure values in stops, ascending.
        measure: as of `fuse_exposures`.

    Returns:
        Radiance (1, 3, H, W) in the darkest exposure's units, and the flows and masks it was made with.

    Raises:
        ValueError: there is no such baseline.
    """
    if name not in BASELINES:
        raise ValueError(f"--baseline must be one of {', '.join(BASELINES)}, got {name!r}")
    return fuse_threes(
        frames[:, None].unbind(), evs, middle_frame(len(frames)), lambda three, _: _fuse_three(name, three, measure)
    )


def _fuse_three(name: str, three: Three, measure: bool) -> Result:
    given, evs = [ldr_values(frame) for frame in three.frames], three.evs
    height, width = given[1].shape[2:]
    aligner = ALIGNERS[name.removesuffix("+mask")]

    def align(pictures: Sequence[Tensor], evs: Sequence[float]) -> list[Tensor]:
        ratios = exposure_ratios(evs)
        return [aligner(pictures[1][0], pictures[k][0], ratios[1], ratios[k]) for k in (0, 2)]

    bracket = calibrate(given, evs, align) if measure else Calibration(evs)
    pictures = [bracket.straighten(frame) for frame in given]
    ratios = exposure_ratios(bracket.evs)
    short, reference, long = (linearize(picture, ratio) for picture, ratio in zip(pictures, ratios, strict=True))
    flow_short, flow_long = align(pictures, bracket.evs)
    mask_short = mask_long = torch.full((1, 1, height, width), float(name != "reference"))
    if name.endswith("+mask"):
        mask_short, mask_long = (
            ghost_mask(safnet_ops.backward_warp(radiance, flow), pictures[1], ratios[1])
            for radiance, flow in ((short, flow_short), (long, flow_long))
        )
    alignment = Alignment(flow_short, flow_long, mask_short, mask_long)
    fused = safnet_ops.fused_fuse(short, reference, long, *alignment, pictures[1])
    return Result(fused, Fusion(fused, alignment), bracket.evs, bracket.curve, evs, reference=three.numbers[1])


def ghost_mask(aligned: Tensor, reference: Tensor, ratio: float) -> Tensor:
    """Where an aligned exposure fits the reference: mask (N, 1, H, W) of 1 and 0.

    It does where, exposed like the reference, its LDR value differs by at most 0.06 in every channel. A clipped
    reference is thus fitted by everything that would clip as well.

    Args:
        aligned: linear radiance (N, 3, H, W).
        reference: LDR values (N, 3, H, W) in [0, 1].
        ratio: the reference's exposure ratio to the short exposure.
    """
    exposed = (aligned * ratio).clamp(0, 1).pow(1 / GAMMA)
    return ((exposed - reference).abs().amax(1, keepdim=True) <= GHOST_THRESHOLD).to(aligned.dtype)


def dis_flow(reference: Tensor, frame: Tensor, reference_ratio: float, frame_ratio: float) -> Tensor:
    """Flow (1, 2, H, W) in pixels from reference to frame (3, H, W), by dense inverse search (Kroeger et al. 2016)."""
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # type: ignore[attr-defined]
    pictures = equally_exposed(reference, frame, reference_ratio, frame_ratio)
    if min(pictures[0].shape) < 2 * search.getPatchSize():
        raise ValueError(f"baseline dis: frames must be at least {2 * search.getPatchSize()} pixels a side")
    return _tensor(search.calc(*pictures, None).transpose(2, 0, 1))


def homography_flow(reference: Tensor, frame: Tensor, reference_ratio: float, frame_ratio: float) -> Tensor:
    """As `dis_flow`, of the one homography that ORB features agree on; no motion where they agree on none."""
    matrix = _homography(*equally_exposed(reference, frame, reference_ratio, frame_ratio))
    height, width = reference.shape[1:]
    return motion_flow(matrix, height, width)


def no_flow(reference: Tensor, frame: Tensor, reference_ratio: float, frame_ratio: float) -> Tensor:
    """As `dis_flow`, of a scene in which nothing moves."""
    return reference.new_zeros(1, 2, *reference.shape[1:])


def _homography(reference: Grey, frame: Grey) -> npt.NDArray[np.float64]:
    """Matrix (3, 3) from the reference's pixels to the frame's."""
    orb = cv2.ORB_create(ORB_FEATURES)  # type: ignore[attr-defined]
    (points, features), (frame_points, frame_features) = (orb.detectAndCompute(p, None) for p in (reference, frame))
    if features is None or frame_features is None:
        return np.eye(3)
    matches = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(features, frame_features)
    if len(matches) < FEWEST_INLIERS:
        return np.eye(3)
    source = np.array([points[match.queryIdx].pt for match in matches], np.float32)
    target = np.array([frame_points[match.trainIdx].pt for match in matches], np.float32)
    cv2.setRNGSeed(0)
    matrix, inliers = cv2.findHomography(source, target, cv2.RANSAC, RANSAC_PIXELS)
    return np.eye(3) if matrix is None or inliers.sum() < FEWEST_INLIERS else np.asarray(matrix, np.float64)


def _tensor(flow: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(flow, np.float32))[None]


ALIGNERS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "reference": no_flow,
    "unaligned": no_flow,
    "homography": homography_flow,
    "dis": dis_flow,
}

# "reference" is the reference exposure alone: a mask could take nothing from it.
BASELINES = ("reference", *(f"{name}{mask}" for name in ("unaligned", "homography", "dis") for mask in ("", "+mask")))
