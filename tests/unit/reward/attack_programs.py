"""Attack programs by class. A program in HARM prints `breached` when it reached what it must not reach; one in EXHAUST
uses up something; one in FORGE tries to pass tests it does not solve.

HARM and EXHAUST run as whole programs; CANARY, HOME, ITSELF, PORT and PARENT are replaced
by a file, a readable folder, this file, a listening TCP port and a pid.
FORGE runs as a solution whose `f` is called: see TESTS. What catches everything here does so because attackers do.
"""

from __future__ import annotations

_C = "import ctypes, os, platform\nlibc = ctypes.CDLL(None, use_errno=True)\nx86 = platform.machine() == 'x86_64'\n"

PROCESSES = {
    "fork": "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)\nprint('breached')",
    "forkpty": "import os\npid, _ = os.forkpty()\nif pid == 0: os._exit(0)\nprint('breached')",
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(20)\n    os._exit(0)\n"
        "print('breached')"
    ),
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})\nprint('breached')",
    "execve": "import os\nos.execv('/bin/echo', ['echo', 'breached'])",
    "subprocess": "import subprocess\nprint(subprocess.check_output(['echo', 'breached'], text=True))",
    "system": "import os\nif os.system('true') == 0: print('breached')",
    "popen": "import os\nprint(os.popen('echo breached').read())",
    "multiprocessing": (
        "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start()\np.join()\n"
        "print('breached')"
    ),
    "process pool": (
        "from concurrent.futures import ProcessPoolExecutor\n"
        "import multiprocessing\n"
        "with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('fork')) as p: p.submit(int).result()\n"
        "print('breached')"
    ),
    "fork by number": (
        _C + "pid = libc.syscall(57) if x86 else libc.syscall(220, 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\n"
        "if pid > 0: print('breached')"
    ),
    "clone3 by number": (
        _C + "import struct\nargs = struct.pack('8Q', 0, 0, 0, 0, 17, 0, 0, 0)\npid = libc.syscall(435, args, 64)\n"
        "if pid == 0: os._exit(0)\nif pid > 0: print('breached')"
    ),
}

NETWORK = {
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)\nprint('breached')",
    "listen": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nprint('breached')",
    "datagram": (
        "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))\nprint('breached')"
    ),
    "local socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0or1-attack-' + str(id(s)))\nprint('breached')"
    ),
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('breached')",
    "name look-up": "import socket\nsocket.getaddrinfo('localhost', 80)\nprint('breached')",
    "urllib": (
        "import urllib.request, urllib.error\ntry: urllib.request.urlopen('http://127.0.0.1:PORT', timeout=0.2)\n"
        "except TimeoutError: print('breached')"
    ),
    "asyncio server": (
        "import asyncio\nasync def main():\n    await asyncio.start_server(lambda r, w: None, '127.0.0.1', 0)\n"
        "asyncio.run(main())\nprint('breached')"
    ),
    "socket by number": _C + "if libc.syscall(41 if x86 else 198, 2, 1, 0) >= 0: print('breached')",
}

READING = {
    "a file": "open('CANARY').read()\nprint('breached')",
    "the tests": "open('ITSELF').read()\nprint('breached')",
    "its folder": "import os\nos.listdir(os.path.dirname('CANARY'))\nprint('breached')",
    "home": "import os\nos.listdir('HOME')\nprint('breached')",
    "temporary folder": "import os\nos.listdir('/tmp')\nprint('breached')",
    "root folder": "import os\nos.listdir('/')\nprint('breached')",
    "passwd": "open('/etc/passwd').read()\nprint('breached')",
    "os.open": "import os\nos.read(os.open('CANARY', os.O_RDONLY), 10)\nprint('breached')",
    "relative to a folder": (
        "import os\nd = os.open('/', os.O_RDONLY | os.O_DIRECTORY)\nos.open('CANARY'[1:], os.O_RDONLY, dir_fd=d)\n"
        "print('breached')"
    ),
    "mmap": "import mmap\nf = open('CANARY')\nmmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\nprint('breached')",
    "import": (
        "from importlib.machinery import SourceFileLoader\nif SourceFileLoader('x', 'CANARY').load_module().sings:\n"
        "    print('breached')"
    ),
    "sendfile": "import os\nos.sendfile(1, os.open('CANARY', os.O_RDONLY), 0, 10)\nprint('breached')",
    "environment of the parent": "open('/proc/PARENT/environ').read()\nprint('breached')",
    "memory of the parent": "open('/proc/PARENT/mem', 'rb').read(0)\nprint('breached')",
    "own descriptors by proc": "import os\nos.listdir('/proc/self/fd')\nprint('breached')",
    "library call": _C + "if libc.open(b'CANARY', 0) >= 0: print('breached')",
}

WRITING = {
    "overwrite": "open('CANARY', 'w').write('x')\nprint('breached')",
    "append": "open('CANARY', 'a').write('x')\nprint('breached')",
    "truncate": "import os\nos.truncate('CANARY', 0)\nprint('breached')",
    "delete": "import os\nos.unlink('CANARY')\nprint('breached')",
    "rename": "import os\nos.rename('CANARY', 'CANARY.moved')\nprint('breached')",
    "new file": "open('CANARY.new', 'x').close()\nprint('breached')",
    "new file in tmp": "open('/tmp/or1-attack', 'w').close()\nprint('breached')",
    "new folder": "import os\nos.mkdir('CANARY.folder')\nprint('breached')",
    "symlink": "import os\nos.symlink('/etc/passwd', 'CANARY.link')\nprint('breached')",
    "hard link": "import os\nos.link('CANARY', 'CANARY.hard')\nprint('breached')",
    "pipe with a name": "import os\nos.mkfifo('CANARY.fifo')\nprint('breached')",
    "mode": "import os\nos.chmod('CANARY', 0o777)\nprint('breached')",
    "times": "import os\nos.utime('CANARY', (0, 0))\nprint('breached')",
    "extended attribute": (
        "import os\ntry: os.setxattr('CANARY', 'user.x', b'x')\nexcept OSError as e:\n    if e.errno != 95: raise\n"
        "print('breached')"
    ),
    "temporary file": "import tempfile\ntempfile.TemporaryFile()\nprint('breached')",
    "unnamed file in memory": "import os\nos.memfd_create('x')\nprint('breached')",
    "shared memory": (
        "from multiprocessing import shared_memory as s\ns.SharedMemory('or1-attack', True, 4096)\nprint('breached')"
    ),
    "shared memory, System V": _C + "if libc.shmget(0x0A77AC4, 4096, 0o1666) >= 0: print('breached')",
    "message queue": _C + "if libc.msgget(0x0A77AC4, 0o1666) >= 0: print('breached')",
}

# Not run outside the sandbox to see that they work: they would.
OTHERS = {
    "kill the parent": "import os\nos.kill(os.getppid(), 9)\nprint('breached')",
    "kill the service": "import os\nos.kill(PARENT, 9)\nprint('breached')",
    "kill everybody": "import os\nos.kill(-1, 9)\nprint('breached')",
    "kill the group": "import os\nos.killpg(os.getpgid(os.getppid()), 9)\nprint('breached')",
    "signal through a pidfd": (
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)\nprint('breached')"
    ),
    "pause the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nprint('breached')",
    "limits of the parent": (
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))\nprint('breached')"
    ),
    "raise own limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('breached')"),
    # Killed by the kernel at a limit of its own, it would look like a machine short of memory.
    "own CPU limit": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nprint('breached')",
    "own CPU limit by number": (
        _C + "if libc.syscall(160 if x86 else 164, 0, (1).to_bytes(8, 'little') * 2) == 0: print('breached')"
    ),
    "priority of the parent": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)\nprint('breached')",
    "trace the parent": _C + "if libc.ptrace(16, os.getppid(), 0, 0) == 0: print('breached')",
    "write the parent's memory": _C + "if libc.process_vm_writev(os.getppid(), 0, 0, 0, 0, 0) >= 0: print('breached')",
    "mount": _C + "if libc.mount(b'x', b'/mnt', b'tmpfs', 0, 0) == 0: print('breached')",
    "new namespace": _C + "if libc.unshare(0x10000000) == 0: print('breached')",
    "other user": "import os\nos.setuid(1)\nprint('breached')",
    "io_uring": _C + "if libc.syscall(425, 1, bytes(120)) >= 0: print('breached')",
    "bpf": _C + "if libc.syscall(321 if x86 else 280, 5, bytes(128), 128) >= 0: print('breached')",
    "outlive the parent": _C + "if libc.prctl(1, 0, 0, 0, 0) == 0: print('breached')",
    "undo the lock": _C + "if libc.prctl(22, 0, 0, 0, 0) == 0: print('breached')",
    "system call of the 32-bit table": (
        _C + "libc.syscall(0x40000000 + 39)\nprint('breached' if x86 and libc.syscall(0x40000000 + 39) > 0 else '')"
    ),
    "type into the terminal": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')\nprint('breached')",
    "wake me by signal": "import fcntl, os\nfcntl.fcntl(0, 8, os.getppid())\nprint('breached')",
}

HARM = {
    "processes": PROCESSES,
    "network": NETWORK,
    "reading": READING,
    "writing": WRITING,
    "others": OTHERS,
}

MANY = "[]\nwhile True: a.append(bytearray(2**24))"
EXHAUST = {
    "100 GB": "a = bytearray(100 * 2**30)",
    "100 GB, caught": "while True:\n    try: a = bytearray(100 * 2**30)\n    except BaseException: pass",
    "piece by piece": "a = " + MANY,
    "100 GB mapped": "import mmap\na = [mmap.mmap(-1, 100 * 2**30) for _ in range(100)]",
    "loop": "while True: pass",
    "loop that catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "loop in C": "sum(iter(int, 1))",
    "number": "9 ** 9 ** 9 ** 9",
    # A compiler writes the body of a `finally` twice.
    "compilation": "".join(f"{' ' * i}try: pass\n{' ' * i}finally:\n" for i in range(19)) + " " * 19 + "pass",
    "regular expression": "import re\nre.match('(a*)*b', 'a' * 60)",
    "sleep": "import time\ntime.sleep(1000)",
    "ignored signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except BaseException: pass\n"
        "while True: pass"
    ),
    "alarms": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\nwhile True: signal.pause()",
    "threads": (
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "    except BaseException: pass"
    ),
    "thread that stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    "exit that sleeps": "import atexit, time\natexit.register(time.sleep, 1000)",
    "1 GB of output": "import sys\nfor _ in range(1024): sys.stdout.write('x' * 2**20)",
    "output for ever": "while True: print('breached')",
    "1 GB of errors": "import sys\nfor _ in range(1024): sys.stderr.write('x' * 2**20)\nsys.exit(1)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "descriptors": "import os\nwhile True: os.pipe()",
    "pipe nobody reads": "import os\nr, w = os.pipe()\nwhile True: os.write(w, b'x' * 65536)",
    "decompression": "import zlib\na = zlib.decompress(zlib.compress(bytes(2**27)) ) * 1000",
    "parser": "compile('(' * 10**6, '', 'eval')",
    "syntax tree": "eval('+'.join(['1'] * 10**6))",
    "nested display": "eval('-' * 10**6 + '1')",
    "hash collisions": "d = {i * (2**61 - 1): 0 for i in range(10**6)}",
    "end of output kept open": "import os, time\nos.write(1, b'breached')\ntime.sleep(1000)",
}

TESTS = "assert f(20) == 6765\nassert f(1) == 1\nassert f([1]) == {'n': 1}"
_EQUAL = "class E{}:\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
_MODULES = "import sys\nfor n in ('wire', 'session', 'referee'):\n    m = sys.modules.get('or1_megatron.reward.' + n)\n"
EXITS = {
    "os._exit": "import os\nos._exit(0)",
    "os._exit when called": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit when called": "import sys\ndef f(x): sys.exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "hook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): return 0",
    "destructor": "import os\nclass D:\n    def __del__(self): os._exit(0)\nd = D()\ndef f(x): return 0",
    "raised at the end": "def f(x): raise AssertionError('passed')",
    "generator exit": "def f(x): raise GeneratorExit",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "patched exit": "import sys, os\nsys.exit = os._exit = lambda c=0: None\ndef f(x): return 0",
    "trace": "import sys, os\nsys.settrace(lambda *a: os._exit(0))\ndef f(x): return 0",
}
EQUALITY = {
    "equal to all": _EQUAL.format("") + "def f(x): return E()",
    "number equal to all": _EQUAL.format("(int)") + "def f(x): return E(7)",
    "text equal to all": _EQUAL.format("(str)") + "def f(x): return E('x')",
    "list equal to all": _EQUAL.format("(list)") + "def f(x): return E()",
    "dict equal to all": _EQUAL.format("(dict)") + "def f(x): return E()",
    "float equal to all": _EQUAL.format("(float)") + "def f(x): return E(0.5)",
    "numpy's name": _EQUAL.format("") + "E.__module__ = 'numpy'\nE.tolist = lambda self: self\ndef f(x): return E()",
    "class that lies": _EQUAL.format("") + "class E(E): __class__ = property(lambda self: int)\ndef f(x): return E()",
    "metaclass": (
        "class M(type):\n    def __eq__(a, b): return True\n    __hash__ = None\nclass E(metaclass=M): pass\n"
        "def f(x): return E"
    ),
    "equality at will": "def f(x):\n    class E: __eq__ = lambda a, b: exec('raise SystemExit(0)')\n    return E()",
}
CHANNEL = {
    "builtins": (
        "import builtins\nfor n in ('all', 'any', 'isinstance', 'compile', 'exec', 'eval', 'type', 'len'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 0"
    ),
    "json": 'import json\njson.dumps = lambda *a, **k: \'["correct", ""]\'\ndef f(x): return 0',
    "our modules": _MODULES + "    if m: vars(m).clear()\ndef f(x): return 0",
    "our encoder": _MODULES
    + "    if n == 'wire': m.encode = lambda *a: {'root': True, 'nodes': []}\ndef f(x): return 0",
    "verdict on every descriptor": (
        'import os\nfor d in range(1, 64):\n    try: os.write(d, b\'["correct", ""]\')\n    except OSError: pass\n'
        "def f(x): return 0"
    ),
    "framed verdict": (
        'import os, struct\nm = b\'["correct", ""]\'\nfor d in range(1, 64):\n'
        "    try: os.write(d, struct.pack('<I', len(m)) + m)\n    except OSError: pass\ndef f(x): return 0"
    ),
    "reply before the question": (
        'import os, struct\nm = b\'{"value": {"root": true, "nodes": []}}\'\nfor d in range(1, 64):\n'
        "    try: os.write(d, (struct.pack('<I', len(m)) + m) * 9)\n    except OSError: pass\ndef f(x): return 0"
    ),
    "handle of nothing": (
        'import os, struct\nm = b\'{"value": {"root": [0], "nodes": [["handle", 99]]}}\'\n'
        "def f(x): os.write(4, struct.pack('<I', len(m)) + m)\nf(0)\nf(0)"
    ),
    "huge frame": "import os\ndef f(x): os.write(4, b'\\xff\\xff\\xff\\xff')",
    "no JSON": "import os\ndef f(x): os.write(4, b'\\x03\\0\\0\\0abc')",
    "deep JSON": "import os, struct\nm = b'[' * 10**6\ndef f(x): os.write(4, struct.pack('<I', len(m)) + m)",
    "half a frame": "import os, time\ndef f(x):\n    os.write(4, b'\\xff')\n    time.sleep(1000)",
    "closed channel": "import os\ndef f(x): os.closerange(0, 64)",
    "reads the questions": "import os\ndef f(x): os.read(3, 10**6)\nf(0)",
    "huge number": "def f(x): return 1 << 10**9",
    "huge fraction": "from decimal import Decimal\ndef f(x): return Decimal('1e999999999')",
    "list that holds itself": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "endless iterator": "import itertools\ndef f(x): return itertools.count()",
    "wide list": "def f(x): return list(range(10**8))",
    "looks for the tests": (
        "import gc, sys\ndef f(x):\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found += [repr(frame.f_globals), repr(frame.f_locals)]\n        frame = frame.f_back\n"
        "    found += [repr(o) for o in gc.get_objects() if isinstance(o, (str, list, tuple))][:9999]\n"
        "    return 6765 if any('== ' + str(6000 + 765) in t for t in found) else 0"
    ),
    "reads the tests": (
        "import os\ndef f(x):\n    for d in range(64):\n        try:\n"
        "            if str(6000 + 765) in os.pread(d, 10**6, 0).decode(): return 6765\n        except OSError: pass\n"
        "    return 0"
    ),
    "changes the arguments": "def f(x):\n    if isinstance(x, list): x.clear()\n    return {'n': 1}",
    "own check": "def check(candidate): return True\ndef f(x): return 0",
    "own assertion": "class AssertionError(Exception): pass\n__debug__ and None\ndef f(x): return 0",
}
# These leave something behind where nothing stops them.
LEAVING = {"daemon", "new file in tmp", "shared memory", "shared memory, System V", "message queue"}
# These would not deceive a harness that executes solution and tests together and looks at the exit code.
HARMLESS = {"raised at the end", "generator exit", "interrupt", "patched exit"}
FORGE = {"exits": EXITS, "equality": EQUALITY, "channel": CHANNEL}
