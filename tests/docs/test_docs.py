"""What the front pages count is so. That all pages run is tested in tests/docs."""

from toys.places import ROOT

from fewstep.networks import FAMILIES
from fewstep.objectives import OBJECTIVES

NUMBERS = {
    16: "sixteen", 17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty", 21: "twenty-one", 22: "twenty-two",
    23: "twenty-three", 24: "twenty-four", 25: "twenty-five", 26: "twenty-six", 27: "twenty-seven",
    28: "twenty-eight", 29: "twenty-nine", 30: "thirty",
}  # fmt: skip


def test_what_is_counted_is_so() -> None:
    fields = [name for name, method in OBJECTIVES.items() if getattr(method, "trains_field", False)]
    index = (ROOT / "docs" / "index.md").read_text()
    assert f"`MeanFlow()` and [{NUMBERS[len(OBJECTIVES) - len(fields) - 3]} more]" in index
    assert all(f"`{name}()`" in index or f"`{name}(FlowMatching())`" in index for name in fields)
    assert f"[{NUMBERS[len(FAMILIES)].capitalize()} families of diffusers]" in (ROOT / "README.md").read_text()
    for page in ("README.md", "docs/index.md"):
        assert NUMBERS[len(OBJECTIVES)][1:] in (ROOT / page).read_text()
