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
        "most frequent winner of 5 layers and 10 steps: F full, 0 lora0_r4, . none; steps from "
        "left to right"
    )
    assert [name for name, _ in found.rows][:2] == ["0.q_proj", "5.q_proj"]
    assert [cells for _, cells in found.rows] == ["F" * 12] * 5 + ["0" * 9 + "F" * 3] * 5


def test_steps_at_rate_0_have_no_winner(tmp_path):
    write_routing(tmp_path, 1)
    assert {cells for _, cells in small_map(tmp_path).rows} == {"."}
