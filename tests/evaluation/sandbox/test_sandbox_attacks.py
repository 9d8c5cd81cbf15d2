"""Attacks on the sandbox: none leaks anything, none passes, and the runner survives each.

A break-out is a function that returns True on success, so that its test would pass; a fake is a wrong answer
disguised as a correct one. All run as one batch in each kind of sandbox that this machine supports.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mftctl.errors import SandboxError
from mftctl.evaluation.sandbox import find
from mftctl.evaluation.sandbox.find import find_sandbox, why_it_leaks
from mftctl.evaluation.sandbox.judge import judge_programs
from mftctl.evaluation.sandbox.kinds import Sandbox, candidates
from mftctl.evaluation.sandbox.program import Limits, Program, Verdict
from mftctl.evaluation.sandbox.python_files import find_installation

SECRET = "a-canary-of-the-tests"
LIMITS = Limits(cpu_seconds=2, wall_seconds=6.0)
SANDBOXES = {sandbox.kind: sandbox for sandbox in candidates(find_installation())}


def reads(path: str) -> str:
    return f"def attack():\n    return {SECRET!r} in open({path!r}, errors='replace').read()"


def calls(body: str, imports: str = "os") -> str:
    return f"import {imports}\ndef attack():\n    {body}\n    return True"


BREAKOUTS = {
    "read a file in the home folder": reads("{home}/secret"),
    "read a file in the temporary folder": reads("{outside}/secret"),
    "read through dot dot": reads("../../../../../../../..{outside}/secret"),
    "read through a symbolic link": "import os\ndef attack():\n    os.symlink('{outside}/secret', 'link')\n"
    f"    return {SECRET!r} in open('link').read()",
    "read through a hard link": "import os\ndef attack():\n    os.link('{outside}/secret', 'link')\n"
    f"    return {SECRET!r} in open('link').read()",
    "list the home folder": calls("return bool(os.listdir('{home}'))"),
    "list the root folder": calls(
        "return 'home' in os.listdir('/') and bool(os.listdir('/home') or os.listdir('/root'))"
    ),
    "read the passwords": "def attack():\n    return 'root' in open('/etc/passwd').read()",
    "read the shadow passwords": "def attack():\n    return bool(open('/etc/shadow').read())",
    "read the environment": f"import os\ndef attack():\n    return {SECRET!r} in str(dict(os.environ))",
    "read the environment of the parent": "import os\ndef attack():\n"
    "    return b'PATH=' in open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "read the environment of the runner": "def attack():\n    return 'PATH=' in open('/proc/{pid}/environ').read()",
    "read the memory of the runner": "def attack():\n    return bool(open('/proc/{pid}/mem', 'rb').read(1))",
    "read the maps of the runner": "def attack():\n    return bool(open('/proc/{pid}/maps').read())",
    "list the files of the runner": calls("return bool(os.listdir('/proc/{pid}/fd'))"),
    "read the kernel's log": "def attack():\n    return bool(open('/dev/kmsg', 'rb').read(1))",
    "read the disk": "def attack():\n    return bool(open('/dev/vda', 'rb').read(1) or open('/dev/sda', 'rb').read(1))",
    "read the project": "def attack():\n    return bool(open('{project}/pyproject.toml').read())",
    "import the project": "def attack():\n    import mftctl.experiments.run_folder\n    return True",
    "inherit a file": "import os\ndef attack():\n    return any(os.pread(fd, 99, 0) == SECRET for fd in range(3, 256))"
    f"\nSECRET = {SECRET!r}.encode()",
    "write into the home folder": "def attack():\n    open('{home}/new', 'w').write('x')\n    return True",
    "write into the temporary folder": "def attack():\n    open('{outside}/new', 'w').write('x')\n    return True",
    "overwrite a file": "def attack():\n    open('{outside}/secret', 'w').write('x')\n    return True",
    "cut a file off": calls("os.truncate('{outside}/secret', 0)"),
    "delete a file": calls("os.unlink('{outside}/secret')"),
    "delete a tree": "import shutil\ndef attack():\n    shutil.rmtree('{outside}')\n    return True",
    "rename a file": calls("os.rename('{outside}/secret', '{outside}/other')"),
    "move a file in": calls("os.rename('{outside}/secret', 'mine')"),
    "make a folder": calls("os.mkdir('{outside}/folder')"),
    "make a device": "import os, stat\ndef attack():\n    os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))\n    return True",
    "change rights": calls("os.chmod('{outside}/secret', 0o777); assert os.stat('{outside}/secret').st_mode & 2"),
    "write where Python's library lies": "import os\ndef attack():\n    open(os.path.join(os.path.dirname(os.__file__), 'evil.py'), 'w')\n    return True",
    "write into the shared memory": "def attack():\n    open('/dev/shm/mftctl-evil', 'w').write('x')\n    return True",
    "change the root": calls("os.chroot('.')"),
    "connect by IPv4": "import socket\ndef attack():\n    socket.create_connection(('127.0.0.1', {port}), 2)\n    return True",
    "connect by IPv6": "import socket\ndef attack():\n    socket.socket(socket.AF_INET6).connect(('::1', {port}))\n    return True",
    "connect to a socket file": "import socket\ndef attack():\n    socket.socket(socket.AF_UNIX).connect('{outside}/socket')\n    return True",
    "connect to an abstract socket": "import socket\ndef attack():\n    socket.socket(socket.AF_UNIX).connect('\\0{abstract}')\n    return True",
    "send a datagram": "import socket\ndef attack():\n    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))\n    return True",
    "open a raw socket": "import socket\ndef attack():\n    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\n    return True",
    "open a packet socket": "import socket\ndef attack():\n    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n    return True",
    "open a netlink socket": "import socket\ndef attack():\n    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\n    return True",
    "open a vsock socket": "import socket\ndef attack():\n    socket.socket(40, socket.SOCK_STREAM)\n    return True",
    "open an Alg socket": "import socket\ndef attack():\n    socket.socket(38, 5)\n    return True",
    "make a pair of sockets": "import socket\ndef attack():\n    socket.socketpair()\n    return True",
    "listen": "import socket\ndef attack():\n    socket.create_server(('127.0.0.1', 0))\n    return True",
    "fork": calls("pid = os.fork(); pid or os._exit(0)"),
    "fork through the C library": "import ctypes, os\ndef attack():\n    return ctypes.CDLL(None).fork() > 0 or os._exit(0)",
    "start a process": "import subprocess\ndef attack():\n    return subprocess.run(['/bin/true']).returncode == 0",
    "start a shell": calls("return os.system('true') == 0"),
    "become another program": calls("os.execv('/bin/true', ['true'])"),
    "start a process by posix_spawn": calls("os.posix_spawn('/bin/true', ['true'], dict())"),
    "leave a process behind": "import subprocess\ndef attack():\n    subprocess.Popen(['sleep', '77.7'], start_new_session=True)\n    return True",
    "fork without end": calls("[os.fork() for _ in range(64)]"),
    "signal the runner": "import os, signal\ndef attack():\n    os.kill({pid}, signal.SIGUSR1)\n    return True",
    "kill the runner": "import os\ndef attack():\n    os.kill({pid}, 9)\n    return True",
    "kill the parent": "import os\ndef attack():\n    os.kill(os.getppid(), 9)\n    return True",
    "kill everything": "import os\ndef attack():\n    os.kill(-1, 9)\n    return True",
    "signal by a process's file": "import signal, os\ndef attack():\n    signal.pidfd_send_signal(os.pidfd_open({pid}), 9)\n    return True",
    "trace the runner": "import ctypes\ndef attack():\n    return ctypes.CDLL(None).ptrace(0x4206, {pid}, 0, 0) == 0",
    "trace the parent": "import ctypes, os\ndef attack():\n    return ctypes.CDLL(None).ptrace(0x4206, os.getppid(), 0, 0) == 0",
    "read another process's memory": "import ctypes\ndef attack():\n"
    "    return ctypes.CDLL(None).syscall(310, {pid}, 0, 0, 0, 0, 0) == 0",
    "make a user namespace": "import ctypes\ndef attack():\n    return ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mount": "import ctypes\ndef attack():\n    return ctypes.CDLL(None).mount(b'none', b'.', b'tmpfs', 0, None) == 0",
    "load a program into the kernel": "import ctypes\ndef attack():\n    return ctypes.CDLL(None).syscall(321, 0, 0, 0) >= 0",
    "use io_uring": "import ctypes\ndef attack():\n    return ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)) >= 0",
    "raise a limit": "import resource\ndef attack():\n    resource.setrlimit(resource.RLIMIT_CPU, (999, 999))\n    return True",
    "set the clock": "import time\ndef attack():\n    time.clock_settime(time.CLOCK_REALTIME, 0)\n    return True",
    "restart the machine": "import ctypes\ndef attack():\n    return ctypes.CDLL(None).reboot(0x89ABCDEF) == 0",
    "set the host's name": "import socket\ndef attack():\n    socket.sethostname('evil')\n    return True",
    "lower its own niceness": calls("return os.nice(-5) < 0"),
}


def tells(call: str) -> str:
    """Whether the error of a call reveals if a file outside the sandbox exists."""
    return (
        "import os\ndef attack():\n    found = []\n    for name in ('{outside}/secret', '{outside}/none'):\n"
        f"        try: found.append({call})\n        except OSError as error: found.append(error.errno)\n"
        "    return found[0] != found[1]"
    )


QUESTIONS = {
    "see a file": calls("os.stat('{outside}/secret')"),
    "see a file without following": calls("os.lstat('{outside}/secret')"),
    "ask for access": "import os\ndef attack():\n    return os.access('{outside}/secret', os.F_OK)",
    "ask for access as its user": "import os\ndef attack():\n    return os.access('{outside}/secret', 0, effective_ids=True)",
    "tell by opening": tells("open(name)"),
    "tell by making": tells("os.open(name, os.O_CREAT | os.O_EXCL)"),
    "tell by a folder": tells("os.mkdir(name)"),
    "tell by removing": tells("os.unlink(name)"),
    "tell by removing a folder": tells("os.rmdir(name)"),
    "tell by renaming": tells("os.rename(name, 'here')"),
    "tell by going there": tells("os.chdir(name)"),
    "tell by a link": tells("os.readlink(name)"),
    "hold a folder without reading it": calls("os.fstat(os.open('{outside}', os.O_PATH))"),
    "see a process": calls("os.stat('/proc/{pid}')"),
    "see itself": calls("os.readlink('/proc/self/exe')"),
    "see through the library": calls("os.stat(os.path.dirname(os.__file__) + '/..' * 30 + '{outside}/secret')"),
    "see through the working folder": calls("os.stat('../' * 30 + '{outside}/secret')"),
    "see through an open folder": calls("os.stat('../' * 30 + '{outside}/secret', dir_fd=os.open('.', os.O_RDONLY))"),
    "see through a system's link": calls("os.stat('/lib64/../..{outside}/secret')"),
    "see by the kernel's own call": "import ctypes, os\ndef attack():\n"
    "    return ctypes.CDLL(None).statx(-100, b'{outside}/secret', 0, 0x7ff, ctypes.create_string_buffer(256)) == 0",
    "see by a call for open files": "import ctypes, os\ndef attack():\n    return ctypes.CDLL(None).fstatat("
    "-100, b'{outside}/secret', ctypes.create_string_buffer(256), 0x1000) == 0",
    "see by a path that comes while it is asked": "import ctypes, os, signal, time\ndef attack():\n"
    "    path = ctypes.create_string_buffer(b'.' + bytes(200))\n    seen = []\n"
    "    def change(*_): path.value = b'{outside}/secret' if path.value == b'.' else b'.'\n"
    "    signal.signal(signal.SIGALRM, change)\n    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
    "    libc, own = ctypes.CDLL(None), os.stat('.').st_ino\n    out = ctypes.create_string_buffer(256)\n"
    "    end = time.monotonic() + 0.3\n    while time.monotonic() < end:\n        if libc.stat(path, out) == 0: seen.append(out.raw[8:16])\n"
    "    return len(set(seen)) > 1",
    "list the packages": "import os\ndef attack():\n"
    "    return len(os.listdir(os.path.dirname(os.__file__) + '/site-packages')) > 3",
    "list the system's packages": calls("return bool(os.listdir('/usr/lib/python3/dist-packages'))"),
    "list another Python": calls("return bool(os.listdir('/usr/lib/python3.11'))"),
}
FILLING = {
    "write where packages are hidden": "import os\ndef attack():\n"
    "    open(os.path.dirname(os.__file__) + '/site-packages/evil', 'w').write('x')\n    return True",
    "write where the system's are": calls("os.mkdir('/usr/lib/python3/evil')"),
    "large files": "def attack():\n    for n in range(20): open(f'f{n}', 'wb').write(bytes(2**20))\n    return True",
    "files without a name": "import os\ndef attack():\n    kept = []\n    for n in range(9):\n"
    "        kept.append(open('f', 'wb', buffering=0)); os.unlink('f'); kept[-1].write(bytes(2**20)) == 2**20 or 1 / 0\n"
    "    return True",
    "files that never had one": "import os\ndef attack():\n    for n in range(99):\n"
    "        os.close(os.open('.', os.O_TMPFILE | os.O_RDWR))\n    return True",
    "empty files": "def attack():\n    for n in range(99): open(f'f{n}', 'w').close()\n    return True",
    "one file again and again": "import os\ndef attack():\n    for n in range(99): open('f', 'w'); os.unlink('f')\n    return True",
    "empty folders": "import os\ndef attack():\n    for n in range(99): os.mkdir(f'f{n}')\n    return True",
    "folders in folders": "import os\ndef attack():\n    for n in range(99): os.mkdir('d' * 200); os.chdir('d' * 200)\n    return True",
    "a folder that cannot be read": "import os\ndef attack():\n    os.mkdir('d', 0o300); os.chdir('d')\n"
    "    for n in range(99): open(f'f{n}', 'w').close()\n    return True",
    "a file that grows in memory": "import mmap, os\ndef attack():\n    f = open('f', 'w+b'); f.truncate(2**24)\n"
    "    mmap.mmap(f.fileno(), 2**24)[:] = bytes(2**24)\n    return True",
    "a file with a hole": "def attack():\n    f = open('f', 'wb', buffering=0); f.seek(2**24)\n    return f.write(b'x') == 1",
}
BREAKOUTS |= QUESTIONS | FILLING
EQUAL = "class Equal:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
FAKES = {
    "leave with success": "import os\ndef twice(x): os._exit(0)",
    "leave at once": "import os\nos._exit(0)",
    "exit": "import sys\ndef twice(x): sys.exit(0)",
    "raise SystemExit": "def twice(x): raise SystemExit(0)",
    "an object that equals everything": f"{EQUAL}def twice(x): return Equal()",
    "a number that equals everything": "class Equal(int):\n    def __eq__(self, other): return True\ndef twice(x): return Equal(0)",
    "a list that equals everything": "class Equal(list):\n    def __eq__(self, other): return True\ndef twice(x): return Equal()",
    "a text that equals everything": "class Equal(str):\n    def __eq__(self, other): return True\ndef twice(x): return Equal()",
    "not a number": "def twice(x): return float('nan')",
    "another AssertionError": "import builtins\nclass E(Exception): pass\nbuiltins.AssertionError = E\ndef twice(x): return 0",
    "a patched check": "def check(f): pass\ndef twice(x): return 0",
    "patched builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True\ndef twice(x): return 0",
    "own builtins": "def abs(x): return 0\ndef all(x): return True\ndef isinstance(*a): return True\ndef twice(x): return 0",
    "printing a result": "print('passed')\nprint('{\"passed\": true}')\ndef twice(x): print('passed'); return 0",
    "writing a result into every file": "import os\ndef twice(x):\n    for fd in range(1, 64):\n        try: os.write(fd, b'passed\\n')\n"
    "        except OSError: pass\n    return 0",
    "writing a frame into every file": "import os, struct\ndef twice(x):\n    for fd in range(1, 64):\n"
    "        try: os.write(fd, struct.pack('<I', 1) + b'T')\n        except OSError: pass\n    return 0",
    "an exception hook": "import sys\nsys.excepthook = lambda *a: None\ndef twice(x): return 1 / 0",
    "a trace function": "import sys\nsys.settrace(lambda *a: None)\ndef twice(x): return 0",
    "patched frames": "import sys\ndef twice(x):\n    frame = sys._getframe()\n    while frame:\n        frame.f_globals['twice'] = lambda x: 4\n"
    "        frame.f_globals['check'] = lambda f: None\n        frame = frame.f_back\n    return 0",
    "searching the memory for the test": "import gc\ndef twice(x):\n    for found in gc.get_objects():\n"
    "        if isinstance(found, dict) and 'check' in found: found['check'] = lambda f: None\n    return 0",
    "catching the time-out": "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "def twice(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    "sleeping": "import time\ndef twice(x): time.sleep(999)",
    "a thread that goes on": "import threading, time\nthreading.Thread(target=time.sleep, args=(999,)).start()\ndef twice(x): return 0",
    "taking all memory": "def twice(x):\n    kept = []\n    while True: kept.append(bytearray(2**24))",
    "a flood of output": "def twice(x):\n    while True: print('x' * 4096)",
    "a flood of errors": "import sys\ndef twice(x):\n    while True: sys.stderr.write('x' * 4096)",
    "a large file": "def twice(x):\n    with open('big', 'wb') as file:\n        while True: file.write(bytes(2**20))",
    "many files": "def twice(x):\n    n = 0\n    while True:\n        open(str(n), 'wb').write(bytes(2**16)); n += 1",
    "an answer without end": "def twice(x):\n    while True: yield 4",
    "a huge answer": "def twice(x): return [0] * 10**8",
    "a deep answer": "def twice(x):\n    deep = []\n    for _ in range(10**5): deep = [deep]\n    return deep",
    "recursion without end": "def twice(x): return twice(x)",
    "crashing the interpreter": "import ctypes\ndef twice(x): ctypes.string_at(0)",
    "no function at all": "x = 1",
    "no Python at all": "this is not Python",
    "an unreadable folder left behind": "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.chmod('a', 0)\ndef twice(x): return 0",
}
TEST = "def check(f):\n    assert f(2) == 4\n    assert all(abs(f(n) - 2 * n) < 1e-6 for n in range(3))\n\ncheck(twice)"


@dataclass
class Outside:
    """State around the sandbox that must not change."""

    home: Path
    folder: Path
    connections: list[object]
    abstract: str
    port: int


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    kind = SANDBOXES.get(request.param)
    if kind is None:
        pytest.skip("bubblewrap is not installed here")
    leak = why_it_leaks(kind)
    if leak is not None:
        pytest.skip(f"{request.param} does not hold here: {leak}")
    return kind


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("outside")
    for place in (home, folder):
        (place / "secret").write_text(SECRET)
    connections: list[object] = []
    abstract = f"mftctl-test-{os.getpid()}"
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    servers[1].bind(str(folder / "socket"))
    servers[2].bind(f"\0{abstract}")
    for server in servers:
        server.listen()
        threading.Thread(target=_accept, args=(server, connections), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFTCTL_CANARY", SECRET)
        patch.setenv("HOME", str(home))
        yield Outside(home, folder, connections, abstract, servers[0].getsockname()[1])
    for server in servers:
        server.close()


def _accept(server: socket.socket, connections: list[object]) -> None:
    try:
        while True:
            connection, address = server.accept()
            connection.close()
            connections.append(address)
    except OSError:  # the server is closed
        return


def fill(code: str, outside: Outside) -> str:
    """The code with its attack target filled in."""
    values = {
        "home": outside.home,
        "outside": outside.folder,
        "project": Path(__file__).parents[3],
        "pid": os.getpid(),
        "port": outside.port,
        "abstract": outside.abstract,
    }
    for name, value in values.items():
        code = code.replace(f"{{{name}}}", str(value))
    return code.replace("{{", "{").replace("}}", "}")


@pytest.fixture(scope="module")
def verdicts(sandbox: Sandbox, outside: Outside) -> dict[str, Verdict]:
    programs = {name: Program(fill(code, outside), "assert attack() is True") for name, code in BREAKOUTS.items()}
    programs |= {name: Program(code, TEST, "twice") for name, code in FAKES.items()}
    found = judge_programs(sandbox, list(programs.values()), limits=LIMITS)
    return dict(zip(programs, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BREAKOUTS, *FAKES])
def test_the_attack_does_not_pass(verdicts: dict[str, Verdict], name: str) -> None:
    verdict = verdicts[name]
    assert not verdict.passed
    assert verdict.outcome != "passed"
    assert SECRET not in verdict.detail
    assert len(verdict.detail) <= 500
    assert verdict.seconds < LIMITS.wall_seconds + 10


@pytest.mark.slow
def test_nothing_changed_outside(verdicts: dict[str, Verdict], outside: Outside) -> None:
    assert [path.name for path in outside.home.iterdir()] == ["secret"]
    assert sorted(path.name for path in outside.folder.iterdir()) == ["secret", "socket"]
    assert all((place / "secret").read_text() == SECRET for place in (outside.home, outside.folder))
    assert outside.connections == []
    assert not Path("/dev/shm/mftctl-evil").exists()


@pytest.mark.slow
def test_no_process_is_left_behind(verdicts: dict[str, Verdict]) -> None:
    time.sleep(0.2)
    left = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:  # the process has ended in the meantime
                continue
            if b"77.7" in command.split(b"\0") or b"sandbox/child/bootstrap.py" in command:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                left += [command] if parent == str(os.getpid()) else []
    assert left == []


@pytest.mark.slow
def test_an_honest_program_passes_after_all_of_them(verdicts: dict[str, Verdict], sandbox: Sandbox) -> None:
    honest = [
        Program("def twice(x):\n    return 2 * x", TEST, "twice"),
        Program("def sum(a, b):\n    return a + b", "assert sum(1, 2) == 3", "sum"),
        Program("def f(x):\n    x.append(1)", "x = []\nf(x)\nassert x == [1]"),
        Program(
            "def f(x):\n    raise ValueError(x)",
            "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
        ),
        Program("class P:\n    def __init__(s, a): s.a = a\ndef f(p):\n    return p.a", "assert f(P(3)) == 3"),
    ]
    assert [verdict.outcome for verdict in judge_programs(sandbox, honest)] == ["passed"] * len(honest)


HARMLESS = (
    "read a file in the home folder",
    "read through dot dot",
    "read through a symbolic link",
    "list the home folder",
    "read the passwords",
    "read the environment of the parent",
    "read the environment of the runner",
    "list the files of the runner",
    "read the project",
    *(name for name in QUESTIONS if not name.startswith(("tell by", "list "))),
    "tell by opening",
    "make a folder",
    "connect by IPv4",
    "connect to a socket file",
    "connect to an abstract socket",
    "make a pair of sockets",
    "listen",
    "fork",
    "fork through the C library",
    "start a process",
    "start a shell",
    "start a process by posix_spawn",
)


@pytest.mark.slow
def test_the_attacks_work_where_nothing_is_confined(outside: Outside, sandbox: Sandbox) -> None:
    """Harmless attacks only: an attack that cannot succeed would prove nothing."""
    unconfined = find_sandbox(unsafe=True)
    programs = [Program(fill(BREAKOUTS[name], outside), "assert attack() is True") for name in HARMLESS]
    found = judge_programs(unconfined, programs, limits=LIMITS)
    assert {name: verdict.detail for name, verdict in zip(HARMLESS, found, strict=True) if not verdict.passed} == {}
    (outside.folder / "folder").rmdir()
    outside.connections.clear()


@pytest.mark.slow
def test_without_a_sandbox_code_runs_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "candidates", lambda installation: [])
    find._holding_sandbox.cache_clear()
    try:
        with pytest.raises(SandboxError, match="cannot be confined") as caught:
            find_sandbox()
        assert "--unsafe-code" in str(caught.value.hint)
        unsafe = find_sandbox(unsafe=True)
    finally:
        find._holding_sandbox.cache_clear()
    assert unsafe.kind == "none"
    assert judge_programs(unsafe, [Program("def f():\n    return 1", "assert f() == 1")])[0].passed


def test_a_leaking_sandbox_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only candidate is the sandbox without confinement."""
    installation = find_installation()
    monkeypatch.setattr(find, "candidates", lambda _: [Sandbox("none", installation)])
    find._holding_sandbox.cache_clear()
    try:
        with pytest.raises(SandboxError) as caught:
            find_sandbox()
    finally:
        find._holding_sandbox.cache_clear()
    assert "a file outside the sandbox was written" in str(caught.value.actual)


def test_the_kind_in_use_is_named_with_its_limitations() -> None:
    bubblewrap, landlock = (
        Sandbox(kind, find_installation(), passed_over="of this") for kind in ("bubblewrap", "landlock")
    )  # type: ignore[arg-type]
    assert bubblewrap.line == "Model-written code runs under bubblewrap."
    assert "because of this" in landlock.line
    assert "install" in landlock.line
    assert "your own rights" in find_sandbox(unsafe=True).line


@pytest.mark.slow
def test_out_of_memory_a_program_is_killed_first() -> None:
    """The kernel's own order: a score of 1000 is killed first."""
    code = "def f():\n    return open('/proc/self/oom_score_adj').read()"
    unconfined = Sandbox("none", find_installation())
    assert judge_programs(unconfined, [Program(code, "assert int(f()) == 1000")])[0].passed


@pytest.mark.parametrize("limits", [{"cpu_seconds": 0}, {"memory_bytes": -1}])
def test_a_limit_of_zero(limits: dict[str, int]) -> None:
    with pytest.raises(SandboxError, match="above 0"):
        Limits(**limits)  # type: ignore[arg-type]


def test_no_worker(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError, match="at least 1"):
        judge_programs(sandbox, [], workers=0)
