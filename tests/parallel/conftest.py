"""Megatron on CPU, before the first fork; and what tests of whole runs share."""

import pytest

from nemo_moviegen.training.cpu import stand_in_for_cuda
from parallel.runs import write_latents

stand_in_for_cuda()


@pytest.fixture(scope="session")
def nemo():
    """Imported once, before the ranks fork: `pytestmark = pytest.mark.usefixtures("nemo")`."""
    import nemo.lightning

    import nemo_moviegen.training.module  # noqa: F401

    return nemo.lightning


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Clips and images for a run; a module that wants others has its own."""
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    return folder
