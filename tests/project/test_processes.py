"""Processes of tests that are forked: to whoever starts them they are as new interpreters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import processes
import pytest

pytestmark = pytest.mark.cpu

TELL = "import json, os, sys; print(json.dumps([os.getcwd(), sys.argv, dict(os.environ), sys.path[:2], __name__]))"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "own.py").write_text("print('own')")
    (tmp_path / "tell.py").write_text(TELL)
    return {"cwd": tmp_path, "env": {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "more"), "A": "1"}}


@pytest.mark.parametrize(
    "words", [["-c", TELL, "a", "-u"], ["-m", "tell", "b"], ["tell.py"], ["-m", "own"], ["none.py"], ["-m", "none"]]
)
def test_as_a_new_interpreter(place, words):
    """Folder, words, variables, where it looks for modules, output, exit status."""
    ours = processes.run(words, **place)
    theirs = subprocess.run([sys.executable, *words], capture_output=True, text=True, **place)
    assert bool(ours.returncode) == bool(theirs.returncode) and bool(ours.stderr) == bool(theirs.stderr), ours.stderr
    if "tell" not in " ".join(words) and words[0] != "-c":
        assert ours.stdout == theirs.stdout
        return
    (cwd, argv, variables, paths, name), expected = json.loads(ours.stdout), json.loads(theirs.stdout)
    assert [cwd, name] == [expected[0], "__main__"] and variables == place["env"]
    assert [os.path.basename(word) for word in argv] == [os.path.basename(word) for word in expected[1]]
    assert [os.path.abspath(os.path.join(cwd, path)) for path in paths] == [
        os.path.abspath(os.path.join(cwd, path)) for path in expected[3]
    ]


def test_nothing_is_imported_anew():
    """multiprocessing says nothing of a module that is not there. Nothing loaded is looked through for garbage."""
    code = "import gc, sys; done = 'preloaded' in sys.modules; import preloaded\n"
    code += "print(done, {*preloaded.LOADED} - {*sys.modules}, gc.isenabled(), gc.get_freeze_count() > 1e5)"
    done = processes.run(["-c", code])
    assert done.stdout == "True set() True True\n", done.stderr


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("raise SystemExit('no')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
    ],
)
def test_exit_status(code, status):
    done = processes.run(["-c", code])
    assert done.returncode == status
    assert (done.stderr == "no\n") == ("no" in code) and ("ZeroDivisionError" in done.stderr) == (code == "1 / 0")


def test_lines_as_they_come_and_signals():
    code = "import time\ntry: print('ready\\nha', end='', flush=True); time.sleep(100)\n"
    code += "except KeyboardInterrupt: print('lf')"
    process = processes.Started(["-c", code])
    lines = process.lines()
    assert next(lines) == "ready\n" and process.poll() is None
    process.kill(signal.SIGINT)
    assert [*lines] == ["half\n"] and process.wait() == 0


def test_what_does_not_end_is_ended_with_its_children(tmp_path):
    os.mkfifo(tmp_path / "held")
    code = "import subprocess; subprocess.run('exec sleep 77 > held', shell=True)"
    process = processes.Started(["-c", code], cwd=tmp_path)
    with (tmp_path / "held").open() as held:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert process.poll() == -signal.SIGKILL
        assert not held.read()  # comes back when nobody has it open for writing


def test_ranks(tmp_path):
    """Of torch's launcher: forks that no launcher's handler or variable reaches, and whose failure ends all."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and os.getpgid(0) == os.getpid()\n"
        "open(os.path.join(sys.argv[1], os.environ['RANK'] + os.environ['WORLD_SIZE']), 'w').write(__name__)\n"
        "if sys.argv[2] == 'fail': sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(100)\n"
    )
    assert processes.torchrun(3, script, tmp_path, "well").returncode == 0
    assert {p.name: p.read_text() for p in tmp_path.glob("?3")} == {f"{rank}3": "__main__" for rank in range(3)}
    failed = processes.torchrun(2, script, tmp_path, "fail")
    assert failed.returncode == 1 and "exitcode  : 5" in failed.stderr, failed.stderr
