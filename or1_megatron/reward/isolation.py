"""What a process can give up for good before it runs code that nobody vouches for. Imports the standard library only.

Levels, each with all before it:
    rlimits     address space, CPU time, no core, no file growth, own session; capabilities dropped
    partial     landlock or seccomp, whichever the kernel has
    full        landlock (no file but the interpreter's libraries can be read, none written) and seccomp
                (a list of allowed system calls: no process, no socket, no signal to others, no new file)
    namespaces  full, inside bubblewrap: own mount, pid, network and IPC namespaces

Both work without privileges, and as root. The filter is written as BPF here rather than through libseccomp: the
system call is one struct, and no library has to be present on the node.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
from pathlib import Path

from or1_megatron.errors import UserError

LEVELS = ("rlimits", "partial", "full", "namespaces")

SYSTEM_PATHS = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo",
)  # fmt: skip

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 38, 22, 24
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_FS_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many access rights each version knows
_EXECUTE, _READ_FILE, _READ_DIR = 1, 4, 8

# name: x86-64, arm64 (-1: no such call there). Allowed: memory, clocks, own signals, threads, files already open or
# opened for reading. Whatever is in neither list fails with EPERM.
_ALLOWED = """
read 0 63; write 1 64; close 3 57; fstat 5 80; poll 7 -1; ppoll 271 73; lseek 8 62; mmap 9 222; mprotect 10 226;
munmap 11 215; brk 12 214; rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; pread64 17 67;
pwrite64 18 68; readv 19 65; writev 20 66; access 21 -1; faccessat 269 48; faccessat2 439 439; pipe 22 -1; pipe2 293 59;
select 23 -1; pselect6 270 72; sched_yield 24 124; mremap 25 216; mincore 27 232; madvise 28 233; dup 32 23;
dup2 33 -1; dup3 292 24; pause 34 -1; nanosleep 35 101; getitimer 36 102; alarm 37 -1; setitimer 38 103;
getpid 39 172; socketpair 53 199; sendto 44 206; recvfrom 45 207; shutdown 48 210; exit 60 93; exit_group 231 94;
uname 63 160; stat 4 -1; lstat 6 -1; newfstatat 262 79; statx 332 291; statfs 137 43; fstatfs 138 44; getdents64 217 61;
getcwd 79 17; readlink 89 -1; readlinkat 267 78; gettimeofday 96 169; getrlimit 97 163; getrusage 98 165;
sysinfo 99 179; times 100 153; getuid 102 174; getgid 104 176; geteuid 107 175; getegid 108 177; getppid 110 173;
getpgrp 111 -1; getpgid 121 155; getsid 124 156; getgroups 115 158; getresuid 118 148; getresgid 120 150;
sigaltstack 131 132; arch_prctl 158 -1; gettid 186 178; time 201 -1; futex 202 98; sched_getaffinity 204 123;
epoll_create 213 -1; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -1; epoll_pwait 281 22; eventfd2 290 19;
set_tid_address 218 96; restart_syscall 219 128; clock_gettime 228 113; clock_getres 229 114; clock_nanosleep 230 115;
set_robust_list 273 99; getrandom 318 278; rseq 334 293; membarrier 324 283; close_range 436 436; capget 125 90;
sched_getparam 143 121; sched_getscheduler 145 120; rt_sigpending 127 136; rt_sigtimedwait 128 137;
rt_sigsuspend 130 133
"""
# Nothing that solves a problem needs these; the process ends at once and the verdict is sandbox_violation.
_KILLED = """
fork 57 -1; vfork 58 -1; execve 59 221; execveat 322 281; socket 41 198; connect 42 203; bind 49 200; listen 50 201;
accept 43 202; accept4 288 242; sendmsg 46 211; sendmmsg 307 269; ptrace 101 117; process_vm_readv 310 270;
process_vm_writev 311 271; pidfd_open 434 434; pidfd_send_signal 424 424; pidfd_getfd 438 438; kill 62 129;
tkill 200 130; rt_sigqueueinfo 129 138; rt_tgsigqueueinfo 297 240; kcmp 312 272; setsid 112 157; setpgid 109 154;
setuid 105 146;
setgid 106 144; setresuid 117 147; setresgid 119 149; setgroups 116 159; capset 126 91; mount 165 40; umount2 166 39;
pivot_root 155 41; chroot 161 51; unshare 272 97; setns 308 268; bpf 321 280; perf_event_open 298 241;
userfaultfd 323 282; io_uring_setup 425 425; keyctl 250 219; add_key 248 217; request_key 249 218; memfd_create 319 279;
shmget 29 194; shmat 30 196; shmctl 31 195; msgget 68 186; semget 64 190; mq_open 240 180; init_module 175 105;
finit_module 313 273; kexec_load 246 104; reboot 169 142; swapon 167 224; name_to_handle_at 303 264;
open_by_handle_at 304 265
"""
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_TGKILL = {"x86_64": 234, "aarch64": 131}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_SETRLIMIT = {"x86_64": 160, "aarch64": 164}
_OPEN = {"x86_64": 2, "aarch64": -1}
_OPENAT = {"x86_64": 257, "aarch64": 56}
_FCNTL = {"x86_64": 72, "aarch64": 25}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_PRCTL = {"x86_64": 157, "aarch64": 167}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_RET_KILL, _RET_ALLOW, _RET_ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_EPERM, _EACCES, _ENOSYS, _ENOTTY = 1, 13, 38, 25
_CLONE_THREAD = 0x00010000
_NO_PID = 0x7EA5B3C9  # above any that Linux gives
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_SAFE_FCNTL = (0, 1, 2, 3, 4, 1030)  # dup, descriptor and status flags
_SAFE_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, how wide, how much to read
_SAFE_PRCTL = (15, 16, 0x53564D41)  # thread name, name of a memory area


def require(reached: str, required: str, description: str) -> None:
    """Raises UserError when code may not run here."""
    if LEVELS.index(reached) < LEVELS.index(required):
        raise UserError(
            f"reward.require_isolation={required}, but this machine reaches {reached} ({description}); use another "
            f"kernel or install bubblewrap, or accept less with reward.require_isolation={reached}"
        )


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)


def untraceable() -> None:
    """No other process of the same user may read or write this one's memory, by ptrace or /proc."""
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants whose parent is killed become children of this process, which can then wait for them."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def set_limits(memory_mb: int, cpu_s: int) -> None:
    """Address space, CPU time, stack; no core file, no growing file."""
    _, stack = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = 256 * 2**20 if stack == resource.RLIM_INFINITY else min(stack, 256 * 2**20)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, stack))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # SIGXCPU, then SIGKILL
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def drop_capabilities() -> None:
    """For a process of root: what is left is an ordinary owner of root's files."""
    for capability in range(64):
        if _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break  # no such capability, or not ours to drop
    header = struct.pack("Ii", 0x20080522, 0)
    _LIBC.syscall({"x86_64": 126, "aarch64": 91}[platform.machine()], header, bytes(24))


def landlock_version() -> int:
    """0 where the kernel has none."""
    return max(0, _LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1))


def readable_paths() -> list[str]:
    """What Python itself needs to import a module: its libraries, and the linker's."""
    wanted = {
        *(str(Path(item).resolve()) for item in sys.path if item),
        str(Path(sys.base_prefix, "lib").resolve()),
        *SYSTEM_PATHS,
        *("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"),
    }
    return sorted(path for path in wanted if os.path.exists(path))


def landlock_rules(paths: list[str]) -> int:
    """Descriptor of a rule set that allows reading `paths` and nothing else of any file; -1 where unsupported."""
    version = landlock_version()
    if not version:
        return -1
    rights = (1 << _FS_RIGHTS_BY_ABI[min(version, 5)]) - 1
    network = 3 if version >= 4 else 0  # bind and connect, TCP
    scoped = 3 if version >= 6 else 0  # abstract sockets and signals stay inside
    attributes = struct.pack("QQQ", rights, network, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _LIBC.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        return -1
    for path in paths:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | _EXECUTE | (_READ_DIR if os.path.isdir(path) else 0)
        failed = _LIBC.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, handle), 0)
        os.close(handle)
        assert not failed, (path, ctypes.get_errno())
    return rules


def enter(rules: int, program: bytes) -> None:
    """Gives up, for good: new privileges, files outside `rules` (unless -1), system calls that `program` does not
    allow (unless empty), a filter as filter_of_any_process() makes it."""
    if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if rules >= 0:
        if _LIBC.syscall(_LANDLOCK_RESTRICT, rules, 0):
            raise OSError(ctypes.get_errno(), "landlock")
        os.close(rules)
    if program:
        program = for_process(program, os.getpid())
        header = struct.pack(
            "HxxxxxxP", len(program) // 8, ctypes.cast(ctypes.c_char_p(program), ctypes.c_void_p).value
        )
        if _LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0):
            raise OSError(ctypes.get_errno(), "seccomp")


def filter_of_any_process() -> bytes:
    """A seccomp filter that lacks only the process's pid; empty where none can be installed, tried in a child."""
    if platform.machine() not in _AUDIT_ARCH or sys.byteorder != "little":
        return b""
    program = seccomp_program(_NO_PID)
    child = os.fork()
    if not child:
        with contextlib.suppress(OSError):
            enter(-1, program)
            os._exit(0)
        os._exit(1)
    return program if os.waitpid(child, 0)[1] == 0 else b""


def for_process(program: bytes, pid: int) -> bytes:
    """The filter with this pid: much cheaper than to write it anew, in a process that lives for a few ms."""
    return program.replace(struct.pack("I", _NO_PID), struct.pack("I", pid))


def seccomp_program(pid: int) -> bytes:
    """The BPF filter of the process `pid`: 8 bytes an instruction, last one: EPERM."""
    machine = platform.machine()
    column = list(_AUDIT_ARCH).index(machine)
    calls = {number: [_ret(_RET_ALLOW)] for number in _numbers(_ALLOWED, column)}
    calls |= {number: [_ret(_RET_KILL)] for number in _numbers(_KILLED, column)}
    calls[_CLONE[machine]] = [_load(_argument(0)), _jump(0x45, _CLONE_THREAD, 0, 1), _ret(_RET_ALLOW), _ret(_RET_KILL)]
    calls[_CLONE3] = [_ret(_RET_ERRNO | _ENOSYS)]  # glibc then uses clone, whose flags can be seen
    # abort() is tgkill on oneself; SIGKILL is refused, it would look like a machine short of memory.
    own = _either(0, (pid,), _RET_ALLOW, _RET_KILL)
    calls[_TGKILL[machine]] = [_load(_argument(2)), _jump(0x15, 9, 0, 1), _ret(_RET_KILL), *own]
    # So is an own limit of CPU time, at which the kernel would send one; it may be asked for.
    own = [_load(_argument(0)), _jump(0x15, 0, 2, 0), _jump(0x15, pid, 1, 0), _ret(_RET_KILL)]
    asking = [_load(_argument(2)), _jump(0x15, 0, 0, 2), _load(_argument(2) + 4), _jump(0x15, 0, 1, 0)]
    calls[_PRLIMIT[machine]] = [
        *own, _load(_argument(1)), _jump(0x15, resource.RLIMIT_CPU, 1, 0), _ret(_RET_ALLOW),
        *asking, _ret(_RET_ERRNO | _EPERM), _ret(_RET_ALLOW),
    ]  # fmt: skip
    calls[_SETRLIMIT[machine]] = _either(0, (resource.RLIMIT_CPU,), _RET_ERRNO | _EPERM, _RET_ALLOW)
    for number, argument in ((_OPEN[machine], 1), (_OPENAT[machine], 2)):
        reading = [_jump(0x45, _WRITING, 0, 1), _ret(_RET_ERRNO | _EACCES), _ret(_RET_ALLOW)]
        calls[number] = [_load(_argument(argument)), *reading]
    calls[_FCNTL[machine]] = _either(1, _SAFE_FCNTL, _RET_ALLOW, _RET_ERRNO | _EPERM)
    calls[_IOCTL[machine]] = _either(1, _SAFE_IOCTL, _RET_ALLOW, _RET_ERRNO | _ENOTTY)
    calls[_PRCTL[machine]] = _either(0, _SAFE_PRCTL, _RET_ALLOW, _RET_ERRNO | _EPERM)
    calls.pop(-1, None)
    code = [_load(4), _jump(0x15, _AUDIT_ARCH[machine], 1, 0), _ret(_RET_KILL), _load(0)]
    if machine == "x86_64":
        code += [_jump(0x35, 0x40000000, 0, 1), _ret(_RET_KILL)]  # the x32 numbering
    table = [calls.get(number, [_ret(_RET_ERRNO | _EPERM)]) for number in range(max(calls) + 2)]
    first = [number for number, rule in enumerate(table) if not number or rule != table[number - 1]]
    return b"".join([*code, *_search([(number, table[number]) for number in first])])


def _search(rules: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """Finds the rule of a system call: each holds from its number on. Halving, since the kernel walks through the
    filter once for every number there is when it is installed, which is for every program that is run."""
    if len(rules) == 1:
        return rules[0][1]
    middle = len(rules) // 2
    below, above = _search(rules[:middle]), _search(rules[middle:])
    if len(below) < 256:
        return [_jump(0x35, rules[middle][0], len(below), 0), *below, *above]
    return [_jump(0x35, rules[middle][0], 0, 1), _jump(0x05, len(below), 0, 0), *below, *above]


def _numbers(table: str, column: int) -> list[int]:
    rows = [row.split() for row in table.replace("\n", " ").split(";")]
    return [int(row[1 + column]) for row in rows if int(row[1 + column]) >= 0]


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", 0x20, 0, 0, offset)


def _jump(operation: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("HBBI", operation, if_true, if_false, value & 0xFFFFFFFF)


def _ret(action: int) -> bytes:
    return struct.pack("HBBI", 0x06, 0, 0, action)


def _argument(place: int) -> int:
    """Where the low half of a system call's argument lies."""
    return 16 + 8 * place


def _either(argument: int, values: tuple[int, ...], action: int, otherwise: int) -> list[bytes]:
    code = [_load(_argument(argument))]
    for value in values:
        code += [_jump(0x15, value, 0, 1), _ret(action)]
    return [*code, _ret(otherwise)]
