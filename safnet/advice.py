"""What a photographer should know of a bracket before trusting its fusion: frames that do not fit together, in plain words."""

import math
from collections.abc import Sequence

from safnet.align import Aligned, Bracket, exposed_alike
from safnet.calibrate import LARGEST_SURPRISE, Calibration, Exposure, measure_exposures
from safnet.motion import LARGEST_ROLL
from safnet.radiance import GAMMA

NAMES = ("short", "reference", "long")
SAME = 2e-3  # mean difference in LDR values below which two frames are one picture
FEWEST_ALIKE = 0.5  # of the pixels that can be compared, which must show the same in frames of one scene
FEWEST_COMPARABLE = 0.02  # of the pixels, which tell enough
LARGEST_TINT = 0.15  # stops between the colours' exposures
LINEAR_ERROR = 0.05  # share by which measured EVs may differ from 2.2 times the given ones, as which linear frames show


def advise(
    bracket: Bracket,
    aligned: Aligned,
    calibration: Calibration,
    evs: Sequence[float],
    names: Sequence[str | None] = NAMES,
) -> tuple[str, ...]:
    """Sentences about what does not fit; none where all is well.

    Args:
        bracket, aligned: frames and alignment at the size where they were compared.
        calibration: what was measured, or only given.
        evs: the exposures as given.
        names: of the frames; None for one that is not there, of which nothing is said.
    """
    if (twins := _twins(bracket, names)) is not None:
        return (twins,)
    found: list[str] = []
    straight = [calibration.straighten(frame) for frame in bracket.frames]
    exposures = measure_exposures(straight, aligned.visible_flows())
    if calibration.curve is None and _are_linear(exposures, evs):
        return (
            "the frames are 2.2 times as many stops apart as their EVs say: their values are linear, as the files do not say. "
            "Give --curve linear",
        )
    for number, exposure in zip((0, 2), exposures, strict=True):
        name = names[number]
        if name is None:
            continue
        if (stranger := _stranger(bracket, aligned, number, name, calibration.evs)) is not None:
            found.append(stranger)
        elif exposure is not None:
            found += _surprises(name, exposure, evs[number] - evs[1], calibration.evs[number] - calibration.evs[1])
    if exposures == (None, None) and calibration.curve is None:
        found.append(
            "nothing could be measured: too little is well exposed in more than one frame, or it differs too much; "
            "EVs and gamma 2.2 are taken as given"
        )
    return tuple(found)


def _are_linear(exposures: Sequence[Exposure | None], evs: Sequence[float]) -> bool:
    """Whether values of which gamma 2.2 was undone are light itself: each stop of theirs then counts 2.2."""
    return all(
        exposure is not None and abs(exposure.stops / ((evs[number] - evs[1]) * GAMMA) - 1) < LINEAR_ERROR
        for number, exposure in zip((0, 2), exposures, strict=True)
    )


def _twins(bracket: Bracket, names: Sequence[str | None]) -> str | None:
    short, reference, long = bracket.frames
    alike = [float((first - second).abs().mean()) < SAME for first, second in ((short, reference), (reference, long))]
    if all(alike) and None not in names:
        return "the three frames are one and the same picture: nothing can be gained by fusing them"
    for same, pair in zip(alike, (names[:2], names[1:]), strict=True):
        if same and None not in pair:
            return f"the {pair[0]} and the {pair[1]} frame are one and the same picture: their EVs cannot differ"
    return None


def _stranger(bracket: Bracket, aligned: Aligned, number: int, name: str, evs: Sequence[float]) -> str | None:
    """What is wrong with a frame that shows another scene, or this one turned."""
    motion = bracket.motions[number // 2]
    if motion.matched and abs(motion.roll) > LARGEST_ROLL:
        return f"the {name} frame is turned by {motion.roll:.0f} degrees against the reference: turn it upright first"
    alike, comparable = _alike(bracket, aligned, number, evs)
    if comparable >= FEWEST_COMPARABLE and alike < FEWEST_ALIKE and not motion.matched:
        return (
            f"the {name} frame matches the reference in {100 * alike:.0f} % of what can be compared: "
            "it seems to show another scene, or its EV is wrong"
        )
    return None


def _alike(bracket: Bracket, aligned: Aligned, number: int, evs: Sequence[float]) -> tuple[float, float]:
    """Share of the comparable pixels that show the same after alignment, and share of all pixels that are comparable."""
    flow = aligned.visible_flows()[number // 2]
    difference = exposed_alike(bracket.frames[number], bracket.frames[1], flow, evs[number], evs[1])
    comparable = ~difference.isnan()
    same = difference[comparable] < 0.05
    return float(same.float().mean()) if len(same) else 1.0, float(comparable.float().mean())


def _surprises(name: str, exposure: Exposure, given: float, taken: float) -> list[str]:
    found = []
    if abs(exposure.stops - given) > LARGEST_SURPRISE:
        lighter = "lighter" if exposure.stops > given else "darker"
        kept = "the measured exposure was taken" if math.isclose(taken, exposure.stops) else "the given one was kept"
        found.append(
            f"the {name} frame is {abs(exposure.stops - given):.1f} stops {lighter} than its EV says "
            f"({exposure.stops:+.1f} against {given:+.1f} to the reference); {kept}. Check the EVs, and that all frames were "
            "developed alike"
        )
    colours = [stops for stops in exposure.of_colours if not math.isnan(stops)]
    if len(colours) == 3 and max(colours) - min(colours) > LARGEST_TINT:
        gains = ", ".join(
            f"{colour} {stops - exposure.stops:+.2f}"
            for colour, stops in zip(("red", "green", "blue"), exposure.of_colours, strict=True)
        )
        found.append(
            f"the {name} frame has other colours than the reference (stops: {gains}): use one white balance for all frames"
        )
    return found
