"""The map of `molf routing`: many layers and steps in few rows and columns."""

from molf.report.small_map import small_map
from run_files import write_routing


def test_cells_are_most_frequent_winners(tmp_path):
    layers = tuple(f"model.layers.{depth}.q_proj" for depth in range(50))

    def leads(layer, step):
        depth = int(layer.split(".")[2])
        return (2.0, 1.0) if depth < 25 or step >= 90 else (1.0, 2.0)

    write_routing(tmp_path, 120, leads, layers)
    found = small_map(tmp_path, rows=10, columns=12)
    assert found.legend == (
        "most frequent winner of 5 layers of a kind and 10 steps: F full, 0 lora0_r4, . none; "
        "steps from left to right"
    )
    assert [name for name, _ in found.rows][:2] == ["0.q_proj", "5.q_proj"]
    assert [cells for _, cells in found.rows] == ["F" * 12] * 5 + ["0" * 9 + "F" * 3] * 5


def test_a_row_has_one_kind(tmp_path):
    """A row of k_proj and q_proj, which have different winners, would hide one of them."""
    kinds = ("q_proj", "k_proj")
    layers = tuple(f"model.layers.{depth}.{kind}" for depth in range(5) for kind in kinds)
    write_routing(
        tmp_path, 3, lambda name, _: (2.0, 1.0) if "k_proj" in name else (1.0, 2.0), layers
    )
    assert small_map(tmp_path, rows=9).rows == [
        ("0.q_proj", ".00"), ("0.k_proj", ".FF"), ("2.q_proj", ".00"), ("2.k_proj", ".FF"),
        ("4.q_proj", ".00"), ("4.k_proj", ".FF"),
    ]  # fmt: skip
    assert len(small_map(tmp_path, rows=1).rows) == 2


def test_steps_at_rate_0_have_no_winner(tmp_path):
    write_routing(tmp_path, 1)
    assert {cells for _, cells in small_map(tmp_path).rows} == {"."}
