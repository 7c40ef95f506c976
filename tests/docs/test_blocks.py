"""What the pages say runs: every block and every command line, page by page, in an empty folder."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_blocks import REASONS, ROOT, Block, PageError, blocks, pages
from page_inputs import write_hub, write_idx
from page_running import BlockError, Page, counted, run_block, units

PAGES = pages()


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of the inputs, and of what is kept between the pages: data sets, and models fetched from the hub."""
    home = tmp_path_factory.mktemp("stranger")
    (home / "inputs").mkdir()
    write_hub(home / "hub")
    for name in ("mnist", "fashion-mnist"):
        write_idx(home / "data" / name)
    return home


@pytest.fixture
def page(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """An empty folder, with nothing of this machine's user in reach."""
    from huggingface_hub import constants

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, place in {"FEWSTEP_CACHE": "cache", "FEWSTEP_DATA": "data", "HF_HUB_CACHE": "hub"}.items():
        monkeypatch.setenv(name, str(stranger / place))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(stranger / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("previews._MEASURED", "previews._POINTS", "judge._POINTS"):  # of the images that a training shows
        monkeypatch.setattr(f"fewstep.runs.{name}", 32)
    logging.disable(logging.ERROR)
    yield Page(here, stranger / "inputs")
    logging.disable(logging.NOTSET)


def _run(file: Path, page: Page, *, slow: bool) -> None:
    done: Counter[str] = Counter()
    wrong: list[str] = []
    found = _read(file)
    page.measured = any("fewstep compare" in block.text for block in found)
    for block in sorted(found, key=lambda block: block.kind != "file"):
        try:
            done += run_block(page, block, slow=slow)
        except BlockError as error:
            wrong.append(str(error))
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    assert done == counted(found)


def _read(file: Path) -> list[Block]:
    wrong = ""
    try:
        return blocks(file)
    except PageError as error:
        wrong = str(error)
    pytest.fail(wrong, pytrace=False)


def _has(file: Path, outcome: str) -> bool:
    try:
        return counted(blocks(file))[outcome] > 0
    except PageError:  # told by the test of this page
        return outcome == "run"


@pytest.mark.takes_seconds
@pytest.mark.parametrize("file", [file for file in PAGES if _has(file, "run")], ids=_name)
def test_every_block_of_a_page_runs(file: Path, page: Page) -> None:
    _run(file, page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in PAGES if _has(file, "slow")], ids=_name)
def test_the_slow_blocks_run_too(file: Path, page: Page) -> None:
    _run(file, page, slow=True)


def test_what_is_skipped_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """How many may be skipped, by reason: who skips more raises the number here, knowingly."""
    total = sum((counted(_read(file)) for file in PAGES), Counter[str]())
    with capsys.disabled():
        print("\nblocks and command lines of the pages:", dict(total))
    assert total["run"] >= 200
    most = {
        "slow": 30,
        "installs": 16,
        "hub": 8,
        "hours": 20,
        "served": 5,
        "checkout": 8,
        "tested": 12,  # four lines of the maze; Ray, shards from a server, maps from elsewhere and sounds have theirs
        "gpu": 2,
        "gigabytes": 2,
    }
    for reason, number in total.items():
        assert reason == "run" or number <= most.get(reason, 0), (
            f"{number} are skipped since: {REASONS.get(reason, reason)}"
        )


def test_every_command_is_shown_on_the_front_page_of_the_guide() -> None:
    shown = {line.split()[1] for block in blocks(ROOT / "docs" / "index.md") for _, line, _ in units(block)}
    assert shown >= {"train", "distill", "plan", "sample", "ui", "evaluate", "compare", "reflow", "encode", "export",
                     "convert", "push", "cite", "recipes"}  # fmt: skip


def test_a_broken_block_names_its_page_and_line(page: Page) -> None:
    for kind, text, says in (
        ("python", "x = 1\ny = x + nothing", "README.md:11: `.*` does not run: NameError: name 'nothing'"),
        ("shell", "fewstep recipes\nfewstep sample runs/none --steps 2", r"README.md:11: `fewstep sample .*no folder"),
        ("recipe", "data: {name: checkerboard, sise: 3}\nobjectiv: ITVM", "README.md:10: no recipe: .*objectiv"),
    ):
        with pytest.raises(BlockError, match=rf"(?s)^{says}"):
            run_block(page, Block(ROOT / "README.md", 10, kind, text), slow=False)
