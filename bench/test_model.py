"""Speed of both models end to end; `python -m bench.report` adds what compilers make of them."""

import pytest

from bench.models import HEIGHT, VARIANTS, WIDTH, Contender, check, example_exposures, load, on_reference, plain, stock

WAYS = {"cpp": plain, "reference": on_reference, "stock": stock}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_speed(benchmark, variant, way):
    model, exposures = load(variant), example_exposures()
    contender = Contender(way, WAYS[way])
    run = contender.build(model, exposures)
    with contender.context():
        expected = on_reference(model, exposures)()
    check(contender, run, expected)
    benchmark.group = f"SAFNet {variant} {HEIGHT}x{WIDTH}"
    with contender.context():
        benchmark.pedantic(run, rounds=3)
