"""Global motion between two exposures: the homography of a camera that was shifted and turned by hand.

ORB features (Rublee et al. 2011) are matched between frames that are exposed alike, and a homography is fitted to them by
MAGSAC (Barath et al. 2020). It is believed only where enough features of a large enough part of the frame agree on it, where
no hand would turn a camera further, and where it makes the frames more alike than they are without it.
"""

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safnet.radiance import GAMMA

Grey = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float64]

SMALLEST_SIDE = 64  # pixels, below which a frame holds no features
FEATURES = 3000
CORNER_CONTRAST = 5  # of 255; the default of 20 finds nothing in the shadows of a short exposure
RATIO = 0.8  # of the distances to the best and the second best match (Lowe 2004)
INLIER_PIXELS = 2.0
FEWEST_INLIERS = 30
SMALLEST_SHARE = 0.25  # of the matches that must agree
SMALLEST_SPREAD = 0.02  # of the frame's area that the agreeing features must span
LARGEST_ROLL = 30.0  # degrees
LARGEST_GROWTH = 1.5  # of lengths
STILL = 0.3  # pixels; less motion than that everywhere is none
BETTER = 0.98  # of the frames' difference, which the motion must leave at most
CLIPPED = 250  # of 255


class Motion(NamedTuple):
    """Where the reference's pixels lie in another frame of the same size.

    Attributes:
        matrix: (3, 3) homography from the reference's pixels (x, y, 1) to the frame's; the identity where none is believed.
        roll: degrees by which the frame appears turned against the reference, also where that is more than a hand's turn
            and therefore not believed.
        matched: features that agree on the motion; 0 where too few do.
    """

    matrix: Matrix
    roll: float = 0.0
    matched: int = 0

    @classmethod
    def none(cls) -> "Motion":
        return cls(np.eye(3))

    @property
    def is_still(self) -> bool:
        return bool(np.array_equal(self.matrix, np.eye(3)))


def estimate_motion(reference: Tensor, frame: Tensor, reference_ratio: float, frame_ratio: float) -> Motion:
    """Global motion from the reference to a frame.

    Args:
        reference, frame: (3, H, W), LDR values in [0, 1], of one size: about a megapixel serves best.
        reference_ratio, frame_ratio: exposure ratios (`safnet.radiance.exposure_ratios`).
    """
    if min(reference.shape[1:]) < SMALLEST_SIDE:
        return Motion.none()
    first, second = equally_exposed(reference, frame, reference_ratio, frame_ratio)
    found = match_features(first, second)
    if found is None:
        return Motion.none()
    matrix, points, share = found
    if len(points) < FEWEST_INLIERS or share < SMALLEST_SHARE or _spread(points, first.shape) < SMALLEST_SPREAD:
        return Motion.none()
    motion = Motion(matrix, _roll(matrix, first.shape), len(points))
    moves = _is_handheld(matrix, motion.roll, first.shape) and _longest(matrix, first.shape) > STILL
    if moves and _difference(first, second, matrix) <= BETTER * _difference(first, second, np.eye(3)):
        return motion
    return motion._replace(matrix=np.eye(3))


def equally_exposed(reference: Tensor, frame: Tensor, reference_ratio: float, frame_ratio: float) -> tuple[Grey, Grey]:
    """Both frames (3, H, W) as 8-bit grey (H, W) at the longer one's exposure, where they clip alike and are not dark."""
    longer = max(reference_ratio, frame_ratio)
    exposed = (
        (ldr.pow(GAMMA) * (longer / ratio)).clamp(0, 1).pow(1 / GAMMA)
        for ldr, ratio in ((reference, reference_ratio), (frame, frame_ratio))
    )
    first, second = (picture.mul(255).round().mean(0).byte().cpu().numpy() for picture in exposed)
    return first, second


def match_features(reference: Grey, frame: Grey) -> tuple[Matrix, npt.NDArray[np.float32], float] | None:
    """The homography (3, 3) that most features agree on, their places (n, 2) in the reference, and their share of all
    matches; None where there are too few."""
    orb = cv2.ORB_create(FEATURES, fastThreshold=CORNER_CONTRAST)  # type: ignore[attr-defined]
    (points, features), (frame_points, frame_features) = (orb.detectAndCompute(p, None) for p in (reference, frame))
    if features is None or frame_features is None or min(len(features), len(frame_features)) < 2:
        return None
    pairs = cv2.BFMatcher(cv2.NORM_HAMMING).knnMatch(features, frame_features, k=2)
    matches = [pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < RATIO * pair[1].distance]
    if len(matches) < FEWEST_INLIERS:
        return None
    source = np.array([points[match.queryIdx].pt for match in matches], np.float32)
    target = np.array([frame_points[match.trainIdx].pt for match in matches], np.float32)
    cv2.setRNGSeed(0)
    matrix, agrees = cv2.findHomography(source, target, cv2.USAC_MAGSAC, INLIER_PIXELS, maxIters=5000, confidence=0.999)
    if matrix is None:
        return None
    inliers = agrees.ravel().astype(bool)
    return np.asarray(matrix, np.float64), source[inliers], float(inliers.mean())


def motion_at(matrix: Matrix, old: tuple[int, int], new: tuple[int, int]) -> Matrix:
    """A homography between frames of `old` height and width, for the same frames at `new` height and width."""
    (height, width), (new_height, new_width) = old, new
    scale_x, scale_y = new_width / width, new_height / height
    # Pixel centres lie at whole numbers: the frame begins at -0.5.
    resize = np.array([[scale_x, 0, scale_x / 2 - 0.5], [0, scale_y, scale_y / 2 - 0.5], [0, 0, 1]])
    return resize @ matrix @ np.linalg.inv(resize)


def apply_motion(matrix: Matrix, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where a homography takes pixels x, y (any one shape)."""
    (a, b, c), (d, e, f), (g, h, i) = (tuple(float(value) for value in row) for row in matrix)
    depth = g * x + h * y + i
    return (a * x + b * y + c) / depth, (d * x + e * y + f) / depth


def motion_flow(matrix: Matrix, height: int, width: int) -> Tensor:
    """The flow (1, 2, H, W), x then y in pixels, of a homography."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    to_x, to_y = apply_motion(matrix, x, y)
    return torch.stack([to_x - x, to_y - y])[None].float()


def _corners(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    height, width = shape
    return np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float64)


def _moved(matrix: Matrix, points: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    moved = np.c_[points, np.ones(len(points))] @ matrix.T
    return moved[:, :2] / moved[:, 2:]


def _longest(matrix: Matrix, shape: tuple[int, ...]) -> float:
    corners = _corners(shape)
    return float(np.linalg.norm(_moved(matrix, corners) - corners, axis=1).max())


def _roll(matrix: Matrix, shape: tuple[int, ...]) -> float:
    """Degrees by which a homography turns the frame's middle row."""
    height, width = shape
    middle = np.array([[0, (height - 1) / 2], [width - 1, (height - 1) / 2]])
    (x0, y0), (x1, y1) = _moved(matrix, middle)
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _is_handheld(matrix: Matrix, roll: float, shape: tuple[int, ...]) -> bool:
    """Whether a homography neither turns, mirrors nor stretches the frame further than a hand does."""
    corners = _moved(matrix, _corners(shape))
    edges = np.roll(corners, -1, 0) - corners
    lengths = np.linalg.norm(edges, axis=1) / np.array([shape[1], shape[0]] * 2)
    following = np.roll(edges, -1, 0)
    convex = edges[:, 0] * following[:, 1] - edges[:, 1] * following[:, 0] > 0
    grown = (lengths < LARGEST_GROWTH) & (lengths > 1 / LARGEST_GROWTH)
    return bool(convex.all() and grown.all() and abs(roll) <= LARGEST_ROLL)


def _spread(points: npt.NDArray[np.float32], shape: tuple[int, ...]) -> float:
    """Share of the frame that the features span."""
    return cv2.contourArea(cv2.convexHull(points)) / (shape[0] * shape[1])


def _difference(reference: Grey, frame: Grey, matrix: Matrix) -> float:
    """Mean absolute difference of grey values where neither frame is clipped and the motion leads into the frame."""
    height, width = reference.shape
    moved = cv2.warpPerspective(frame, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    inside = cv2.warpPerspective(
        np.full_like(frame, 255), matrix, (width, height), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    )
    seen = (inside > 0) & (np.minimum(reference, moved) < CLIPPED)
    return float(np.abs(reference.astype(np.int16) - moved)[seen].mean()) if seen.any() else math.inf
