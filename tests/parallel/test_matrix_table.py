"""The README's parity table: a line a layout, written between its markers and nowhere else."""

import pytest

from parallel.matrix_table import BEGIN, END, put_between_markers, table

ERRORS = {"loss": (0.0, "loss"), "gradients": (3.4e-15, "head.weight"), "parameters": (2e-11, "head.weight")}
FOUND = {
    (ranks, what, sharding): {**ERRORS, "parameters": (error, "head.weight")}
    for ranks, what in ((4, "CP4"), (2, "CP2"))
    for sharding, error in (("none", 0.0), ("optimizer", 1.96e-14), ("full", 2e-11))
}


def test_the_table_tells_the_largest_error_of_each_row_in_one_digit():
    *_, first, second = table(FOUND).splitlines()
    assert first == "| 2 | CP2 | 3e-15 | 2e-14 | 2e-11 |"
    assert second.startswith("| 4 | CP4 |")


def test_it_takes_the_place_of_the_old_one():
    text = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    assert put_between_markers(text, "new") == f"above\n{BEGIN}\nnew\n{END}\nbelow\n"


@pytest.mark.parametrize("text", ["", f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_a_readme_without_the_markers_is_refused(text):
    with pytest.raises(ValueError, match="the README needs one <!-- parity:begin -->"):
        put_between_markers(text, "new")
