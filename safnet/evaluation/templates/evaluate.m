% Scores every method folder beside this script against truth/, as SAFNet's evaluation does.
% HDR-VDP-2 is added where hdrvdp is on the path (http://hdrvdp.sourceforge.net); the viewing conditions are those common in
% papers on Kalantari's scenes: a 28-inch display seen from 0.55 m.

here = fileparts(mfilename('fullpath'));
truths = dir(fullfile(here, 'truth', '*.hdr'));
folders = dir(here);
mu_law = @(x) log(1 + 5000 * x) / log(1 + 5000);
with_vdp = exist('hdrvdp', 'file') > 0;

for f = 1:numel(folders)
    method = folders(f).name;
    if ~folders(f).isdir || method(1) == '.' || strcmp(method, 'truth')
        continue
    end
    scores = nan(numel(truths), 5);
    for k = 1:numel(truths)
        file = fullfile(here, method, truths(k).name);
        if ~exist(file, 'file')
            continue
        end
        truth = hdrread(fullfile(here, 'truth', truths(k).name));
        result = hdrread(file);
        scores(k, 1) = psnr(mu_law(result), mu_law(truth));
        scores(k, 2) = psnr(result, truth);
        scores(k, 3) = ssim(mu_law(result), mu_law(truth));
        scores(k, 4) = ssim(result, truth);
        if with_vdp
            ppd = hdrvdp_pix_per_deg(28, [size(truth, 2), size(truth, 1)], 0.55);
            vdp = hdrvdp(result, truth, 'sRGB-display', ppd);
            scores(k, 5) = vdp.Q;
        end
        fprintf('%s %s: %.3f %.3f %.4f %.4f %.2f\n', method, truths(k).name, scores(k, :));
    end
    found = ~isnan(scores(:, 1));
    fprintf('%s: PSNR-mu %.3f  PSNR-l %.3f  SSIM-mu %.4f  SSIM-l %.4f  HDR-VDP-2 %.2f  (%d of %d scenes)\n', ...
        method, mean(scores(found, :), 1), sum(found), numel(truths));
end
