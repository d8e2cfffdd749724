"""Fixtures of the engine's tests."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="module", autouse=True)
def plots_without_ticks():
    """Draw plots without ticks, whose labels take most of the time of a tiny run. `test_plots.py` draws them."""
    savefig = Figure.savefig

    def save(figure, path, **options):
        for axes in figure.axes:
            axes.set(xticks=[], yticks=[])
        savefig(figure, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield
