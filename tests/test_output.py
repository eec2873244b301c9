"""Printing ends no run, whatever the locale, the reader or the disk; nothing harmful or secret is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grappa_dist.console import Console, Ending, Events
from grappa_dist.make_shards.progress import Terminal, align
from grappa_dist.output import HIDDEN, has_secret, is_secret_name, printable, without_secrets
from tests.launch.test_make_shards import png

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
PRINTS = """
import sys
from grappa_dist.console import Console, Ending
from grappa_dist.output import guard_output
guard_output()
def work() -> None:
    Console().log("é ĸ 漢 \\udcff")
    for line in range(5000):
        print(line, "é ĸ 漢 \\udcff")
sys.exit(Ending().of(work))
"""


def shell(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line in bash; its status is that of the first command of a pipe."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "PY": sys.executable, "LAUNCH": str(LAUNCH), **env}
    return subprocess.run(
        ["bash", "-c", f"{command}\nexit ${{PIPESTATUS[0]}}"],
        cwd=cwd,
        env=whole,
        capture_output=True,
        encoding="latin-1",
        timeout=100,
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Class folders whose names no small encoding has, and one file whose name is not UTF-8."""
    for number, label in enumerate(("ĸatze", "漢字", "é\x1b[31m", "z")):
        folder = tmp_path / "画像" / label
        folder.mkdir(parents=True)
        (folder / f"{number}.png").write_bytes(png(number))
    (tmp_path / "画像" / "z" / "\udcff.png").write_bytes(png(9))
    return tmp_path / "画像"


STREAMS = ["", "| head -n 1", ">/dev/full", "2>/dev/full", ">&-", "2>&-", "<&- >&- 2>&-", "> >(:) 2> >(:)"]


@pytest.mark.parametrize("streams", STREAMS)
def test_a_run_that_cannot_print_ends_with_0(streams: str, tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    done = shell(f"$PY prints.py {streams}", tmp_path, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ("could not be written: No space left on device" in done.stderr) == (streams == ">/dev/full")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437:strict", "utf-8", "ascii:strict"])
def test_characters_that_an_encoding_lacks_are_printed_as_escapes(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    done = shell("$PY prints.py", tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "4999 " in done.stdout
    assert ("\\u6f22 \\udcff" in done.stdout) == (encoding != "utf-8")


def test_an_unbuffered_program_prints_at_once(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import os\nfrom grappa_dist.output import guard_output\nguard_output()\nprint('before')\nos._exit(0)\n"
    )
    assert shell("$PY -u waits.py", tmp_path).stdout == "before\n"


def test_a_closed_stream_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    (tmp_path / "opens.py").write_text(
        "from grappa_dist.output import guard_output\nguard_output()\nassert open('x', 'w').fileno() > 2\n"
    )
    assert shell("$PY opens.py >&- 2>&- <&-", tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("streams", "env"),
    [
        ("", {"PYTHONIOENCODING": "ascii"}),
        ("", {"LC_ALL": "C"}),
        ("", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
        ("| head -n 1", {}),
        (">/dev/full 2>/dev/full", {}),
        (">&- 2>&-", {}),
    ],
)
def test_make_shards_ends_with_0_after_everything_is_written(
    streams: str, env: dict[str, str], images: Path, tmp_path: Path
) -> None:
    done = shell(f"$PY $LAUNCH/make_shards.py --images '{images}' --out out --workers 1 {streams}", tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert (tmp_path / "out" / "test" / "index.json").is_file()


def test_shards_are_the_same_whatever_the_locale(images: Path, tmp_path: Path) -> None:
    written = []
    for out, env in (("one", {}), ("two", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})):
        done = shell(f"$PY $LAUNCH/make_shards.py --images '{images}' --out {out} --workers 1", tmp_path, **env)
        assert done.returncode == 0, done.stderr
        files = sorted(path for path in (tmp_path / out).rglob("*") if path.is_file())
        written.append([(path.name, path.read_bytes()) for path in files])
    assert written[0] == written[1]
    assert any("漢字".encode() in data for _, data in written[0])


@pytest.mark.parametrize("program", ["make_shards.py", "full_pipeline.py", "embed.py"])
def test_help_and_wrong_options_are_printed_in_any_encoding(program: str, tmp_path: Path) -> None:
    assert shell(f"$PY $LAUNCH/{program} --help >/dev/full", tmp_path, PYTHONIOENCODING="ascii").returncode == 0
    done = shell(f"$PY $LAUNCH/{program} --漢 $'\\xff'", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_plan_that_nobody_reads_ends_with_0(images: Path, tmp_path: Path) -> None:
    shell(f"$PY $LAUNCH/make_shards.py --images '{images}' --out 漢 --workers 1 --split none", tmp_path)
    text = "name: ĸ漢\ndata: {train: 漢/train}\nbackbone: {name: 'timm:vit_tiny_patch16_224'}\n"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    done = shell(
        "$PY $LAUNCH/full_pipeline.py --config c.yaml --dry-run | head -n 1", tmp_path, PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 🙂\tline\nline", "plain é 漢 🙂\tline\nline"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\x9b31m\x7f\r", r"\x9b31m\x7f\r"),
        ("evil\u202egnp.exe\u2066", r"evil\u202egnp.exe\u2066"),
        ("a\u200bb\ufeff\u2028", r"a\u200bb\ufeff\u2028"),
        ("\udcff\U000e0041", r"\udcff\U000e0041"),
    ],
)
def test_what_would_steer_a_terminal_or_hide_text_is_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_name_with_line_breaks_adds_no_line_to_a_log_or_table(capsys: pytest.CaptureFixture[str]) -> None:
    Console().log("image 'a\n[  0:00] done' is bad")
    Terminal(sys.stderr).log("image 'a\nmake_shards: done' is bad")
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert align([["a\nb", "1"], ["c", "22"]]) == ["a\\nb   1", "c     22"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://AKIA:S3/cr+t@bucket/x.tar: gone", "s3://***@bucket/x.tar: gone"),
        ("https://user:pass@host/a b", "https://***@host/a b"),
        ("https://token@host", "https://***@host"),
        ("'https://h/x.tar?X-Amz-Signature=abc&y=1' said", "'https://h/x.tar?***' said"),
        ("two: http://a:b@c, http://d?e=f", "two: http://***@c, http://d?***"),
        ("mail me@host or http://host/a", "mail me@host or http://host/a"),
        ("http://host/x@y.tar", "http://host/x@y.tar"),
    ],
)
def test_secrets_in_urls_are_hidden(text: str, clean: str) -> None:
    assert without_secrets(text) == clean


def test_values_of_secret_variables_are_hidden_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MODE_TOKEN", "on")
    monkeypatch.setenv("GOOGLE_TOKEN", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    text = f"wJalrXUtnFEMI/K7MDENG 0123456789abcdef on falsefalse {tmp_path}"
    assert without_secrets(text) == f"{HIDDEN} {HIDDEN} on falsefalse {tmp_path}"


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "api_key", "password", "AWS_ACCESS_KEY_ID"])
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "class_token_size", "num_tokens_kept", "PATH"])
def test_other_names_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://u:p@host/x", True),
        ("s3://key:se/cret@bucket", True),
        ("https://host/x?sig=ab", True),
        ("https://host/x?a=b&X-Amz-Signature=ab", True),
        ("https://host/x?page=2", False),
        ("s3://bucket/a@b", False),
        ("http://127.0.0.1:9000/a@b.tar", False),
    ],
)
def test_a_url_with_a_secret_is_known(url: str, found: bool) -> None:
    assert has_secret(url) == found


def test_logs_events_and_tracebacks_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-1")
    console = Console(Events(tmp_path / "events.jsonl"))
    console.log("planted-secret-1 \x1b[2J")
    console.event("job_failed", reason="https://u:planted-secret-2@host planted-secret-1")

    def fail() -> None:
        raise OSError("https://h/x?sig=planted-secret-3\x1b]0;title\x07 planted-secret-1 \udcff")

    assert Ending(tmp_path).of(fail) == 1
    written = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    printed = capsys.readouterr()
    assert "OSError" in written
    assert "planted-secret" not in written + printed.out + printed.err
    assert "\x1b" not in printed.err
