"""What a process gives up before it runs a program that nobody has read.

The program could change everything here; what protects others is what the kernel has been told by
then: limits, another user, Landlock on files, seccomp on system calls. All of it is inherited, and
none of it can be taken back.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would take longer to import than all else together
    from collections.abc import Iterable
    from typing import Any

NOT_CONFINED = 97
"""Exit code of a process that could not give up what it had to."""
NOTHING_MORE_S = 1  # of processor time, after which a program that ignores SIGXCPU is killed

_libc = ctypes.CDLL(None, use_errno=True)

# --- Files: Landlock (linux/landlock.h) -----------------------------------------------------------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
NUM_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by version; 16 from the fifth on
READABLE = (
    "/usr/lib",
    "/usr/local/lib",
    "/lib",
    "/lib64",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def landlock_version() -> int:
    """Of the kernel; 0 without it."""
    return max(0, _libc.syscall(CREATE_RULESET, None, 0, 1))


def close_files(folder: str) -> bool:
    """Leave this process its folder, and Python's library to read; False without Landlock."""
    version = landlock_version()
    if not version:
        return False
    everything = (1 << NUM_FS_RIGHTS.get(version, 16)) - 1
    network, signals = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("QQQ", everything, network, signals)[:size]
    ruleset = _libc.syscall(CREATE_RULESET, attributes, size, 0)
    readable = {*READABLE, sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)}
    _allow(ruleset, readable, READ_FILE | READ_DIR | EXECUTE)
    _allow(ruleset, DEVICES, READ_FILE | WRITE_FILE)
    _allow(ruleset, [folder], everything & ~EXECUTE)
    return _libc.syscall(RESTRICT_SELF, ruleset, 0) == 0


def _allow(ruleset: int, paths: Iterable[str], rights: int) -> None:
    for path in paths:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights_here = rights if os.path.isdir(path) else rights & (EXECUTE | WRITE_FILE | READ_FILE)
        _libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights_here, place), 0)
        os.close(place)


# --- System calls: seccomp (linux/seccomp.h, linux/filter.h) --------------------------------------

# Name: number on x86_64 and aarch64; -1 where there is none.
NEVER = {
    "socket": (41, 198),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, -1),
    "vfork": (58, -1),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "open_by_handle_at": (304, 265),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semctl": (66, 191),
    "msgctl": (71, 187),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mkdir": (83, -1),  # so that nothing in its folder takes long to remove
    "mkdirat": (258, 34),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    # On files of this user, wherever they are: Landlock does not know these.
    "truncate": (76, 45),
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "lchown": (94, -1),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
CLONE, CLONE3, TGKILL, PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)
FCNTL, PRCTL = (72, 25), (157, 167)
CLONE_THREAD = 0x10000
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15  # by which the kernel sends signals for a program
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
LOAD, JUMP_EQUAL, JUMP_SET, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
REFUSE = (RETURN, 0, 0, 0x00050000 | 1)  # with EPERM
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
ENOSYS = 38
NR_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT, SECOND_ARGUMENT_AT = 0, 4, 16, 24
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38


def close_system_calls() -> bool:
    """No network, processes, programs, signals or tracing; False on an unknown processor."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        return False
    column, architecture = ARCHITECTURES[machine]
    code = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NR_AT),
        (JUMP_AT_LEAST, 0, 1, 0x40000000),  # the other table of x86_64
        (RETURN, 0, 0, KILL),
    ]
    for numbers in NEVER.values():
        if numbers[column] >= 0:
            code += [(JUMP_EQUAL, 0, 1, numbers[column]), REFUSE]
    code += [(JUMP_EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERRNO | ENOSYS)]  # then clone it is
    code += _only_if(CLONE[column], (JUMP_SET, CLONE_THREAD))
    code += _only_if(TGKILL[column], (JUMP_EQUAL, os.getpid()))
    code += _only_if(PRLIMIT[column], (JUMP_EQUAL, 0))
    for command in (F_SETOWN, F_SETSIG, F_SETOWN_EX):
        code += _unless(FCNTL[column], SECOND_ARGUMENT_AT, command)
    code += _unless(PRCTL[column], FIRST_ARGUMENT_AT, PR_SET_PDEATHSIG)
    code += [(RETURN, 0, 0, ALLOW)]
    filters = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(filters)
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return _libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0) == 0


def _only_if(number: int, condition: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Refuse a call unless its first argument is so."""
    jump, value = condition
    return [
        (JUMP_EQUAL, 0, 4, number),
        (LOAD, 0, 0, FIRST_ARGUMENT_AT),
        (jump, 1, 0, value),
        REFUSE,
        (RETURN, 0, 0, ALLOW),
    ]


def _unless(number: int, argument_at: int, value: int) -> list[tuple[int, int, int, int]]:
    """Refuse a call if one of its arguments is so."""
    return [
        (JUMP_EQUAL, 0, 4, number),
        (LOAD, 0, 0, argument_at),
        (JUMP_EQUAL, 0, 1, value),
        REFUSE,
        (LOAD, 0, 0, NR_AT),
    ]


# --- Limits and user ------------------------------------------------------------------------------


def limit(limits: dict[str, int]) -> None:
    """Lower the limits of this process for good."""
    cpu_s = limits["cpu_s"]
    _lower(resource.RLIMIT_CPU, cpu_s, cpu_s + NOTHING_MORE_S)
    for kind, value in {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["num_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }.items():
        _lower(kind, value, value)
    if limits["num_threads"]:
        _lower(resource.RLIMIT_NPROC, limits["num_threads"], limits["num_threads"])


def _lower(kind: int, soft: int, hard: int) -> None:
    _, allowed = resource.getrlimit(kind)
    if allowed != resource.RLIM_INFINITY:
        soft, hard = min(soft, allowed), min(hard, allowed)
    resource.setrlimit(kind, (soft, hard))


def become(user: int) -> None:
    """Another user for good, or the same without any rights of root."""
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    elif os.getuid() == 0:
        header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
        _libc.capset(header, bytes(24))


def confine(settings: dict[str, Any]) -> None:
    """Give up everything at once; end this process if something that was promised does not hold."""
    _libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    become(settings["user"])
    _libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)  # which a change of user takes back
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    holds = {"landlock": close_files(os.getcwd())}
    limit(settings["limits"])
    holds["seccomp"] = close_system_calls()
    for name, is_promised in settings["promised"].items():
        if is_promised and not holds[name]:
            os.write(2, f"{name} does not hold".encode())
            os._exit(NOT_CONFINED)
