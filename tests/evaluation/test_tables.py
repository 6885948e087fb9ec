"""A result as a table: aligned as text, escaped as HTML."""

from __future__ import annotations

from iou_refiner.evaluation.tables import Table


class Named(Table):
    caption = "of <b>two</b>"
    columns = ("", "AP & more")

    def rows(self) -> list[tuple[str, str]]:
        return [("<script>x</script>", "9.5"), ("b", "10.25")]


def test_names_stand_left_and_numbers_right():
    lines = str(Named()).splitlines()
    assert lines == [
        "of <b>two</b>", "                    AP & more",
        "<script>x</script>        9.5", "b                       10.25",
    ]  # fmt: skip
    assert repr(Named()) == str(Named())


def test_what_stands_in_a_cell_is_text():
    html = Named()._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;x&lt;/script&gt;" in html
    assert "AP &amp; more" in html
    assert html.count("<td") == 4
