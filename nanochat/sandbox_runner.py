"""What `nanochat.execution` starts: locks itself in, then runs one piece of untrusted Python. Standard library only.

    python -I -S sandbox_runner.py PARENT_PID STATUS_FD  < header line, code, stdin

Two processes. The keeper enters new namespaces (namespaces(7)), forks, waits and passes the exit status on. The child
is process 1 of its pid namespace, so its end is the end of all it started. Before the first line of the code runs, the
child has: a root of its own with nothing but Python and an empty /tmp (pivot_root(2)), no uid 0 and no capability,
resource limits, Landlock rules (landlock(7), ABI 1 to 6) and a seccomp filter (seccomp(2)). What the kernel refuses is
off, and is said to be off, in the first line of the status pipe. The nonce follows it if the code came to its end.

The nonce lies in this process: os._exit, sys.exit, atexit and a replaced excepthook do not reach it, but code that
searches the interpreter's frames for it will find it.
"""

# ruff: noqa: PTH102, PTH103, PTH108, PTH109, PTH110, PTH112, PTH114, PTH115, PTH116, PTH120, PTH211
# os.path throughout: importing pathlib would double the time of all other imports.
import ctypes
import os
import platform
import resource
import signal
import struct
import sys

NOBODY = 65534  # uid and gid of the code when the caller is root
OPEN_FILES = 64
PROCESSES = 64  # counts threads; in a user namespace those of this sandbox alone, else all of the user's
FILE_BYTES = 16 << 20  # longest file
DISK_BYTES = 64 << 20  # all files together, where the mount namespace is on
DISK_FILES = 4096

CLONE = {
    "mount_namespace": 0x00020000,
    "uts_namespace": 0x04000000,
    "ipc_namespace": 0x08000000,
    "user_namespace": 0x10000000,
    "pid_namespace": 0x20000000,
    "net_namespace": 0x40000000,
}  # sched.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
ST_TO_MS = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}  # statvfs flags a bind mount must keep
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
LANDLOCK_READ = 4 | 8  # read a file, list a folder
LANDLOCK_DEVICE = 2 | 4  # write and read a file
LANDLOCK_NOT_IN_WORK = 1 | 1 << 6 | 1 << 11 | 1 << 15  # execute; make devices; ioctl on devices
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = platform.machine() if sys.platform == "linux" else ""
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

# Numbers of what is refused, (x86_64, aarch64), 0 where there is none: asm/unistd_64.h, asm-generic/unistd.h.
DENIED = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "fork": (57, 0), "vfork": (58, 0),
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "setsid": (112, 157), "setpgid": (109, 154),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "prctl": (157, 167),
    "seccomp": (317, 277), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "quotactl": (179, 60), "personality": (135, 92), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
}  # fmt: skip
# Landlock does not know these: refused where the user's files are not out of sight altogether.
DENIED_IN_VIEW = {
    "chmod": (90, 0), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, 0),
    "fchown": (93, 55), "lchown": (94, 0), "fchownat": (260, 54), "utime": (132, 0), "utimes": (235, 0),
    "futimesat": (261, 0), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "truncate": (76, 45),
}  # fmt: skip
KILL, TGKILL, PRLIMIT = (62, 129), (234, 131), (302, 261)  # allowed on oneself
CLONE_CALL, CLONE3, CLONE_THREAD = (56, 220), (435, 435), 0x00010000
PIVOT_ROOT, CAPSET = (155, 41), (126, 91)
EPERM, ENOSYS = 1, 38


def main() -> None:
    """Read the request, fork, wait; the last line of the status pipe is the child's exit code, or 128 + its signal."""
    parent, status = int(sys.argv[1]), int(sys.argv[2])
    on = {"dies_with_parent": prctl(PR_SET_PDEATHSIG, signal.SIGTERM)}
    if os.getppid() != parent:
        os._exit(1)
    header, _, body = sys.stdin.buffer.read().partition(b"\n")
    nonce, code_bytes, cpu_s, memory, off, required = header.decode().split(" ")
    code, stdin = body[: int(code_bytes)], body[int(code_bytes) :]
    root = os.geteuid() == 0
    enter_namespaces(on, off.split(","), root)
    alive, held = os.pipe()  # the child sees the end of `alive` when this process is gone
    child = os.fork()
    if child == 0:
        os.close(held)
        try:
            set_stdin(stdin)
            lock_in(on, off.split(","), root, int(cpu_s), int(memory))
            leave_if_alone(alive)
            os.write(status, " ".join(f"{name}={value:d}" for name, value in on.items()).encode() + b"\n")
            if all(on.get(name) for name in required.split(",") if name):
                run(code, status, nonce.encode())
        finally:
            os._exit(1)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    _, waited = os.waitpid(child, 0)
    exit_code = os.WEXITSTATUS(waited) if os.WIFEXITED(waited) else 128 + os.WTERMSIG(waited)
    os.write(status, f"\n{exit_code}".encode())
    os._exit(0)


def set_stdin(data: bytes) -> None:
    """Make `data` the standard input of this process."""
    with open("stdin", "wb") as f:
        f.write(data)
    fd = os.open("stdin", os.O_RDONLY)
    os.unlink("stdin")
    os.dup2(fd, 0)
    os.close(fd)


def leave_if_alone(alive: int) -> None:
    """Exit if the keeper died before it could be told to the kernel that this process dies with it."""
    os.set_blocking(alive, False)
    try:
        os.read(alive, 1)
        os._exit(1)
    except BlockingIOError:
        os.close(alive)


def run(code: bytes, status: int, nonce: bytes) -> None:
    """Run the code as __main__; write the nonce, or what it raised, to the status pipe; exit. Never returns."""
    write, leave, show = os.write, os._exit, sys.__excepthook__  # the code may replace these
    module = type(sys)("__main__")
    sys.modules["__main__"], sys.argv = module, ["main.py"]
    os.environ.clear()
    try:
        exec(compile(code, "main.py", "exec", dont_inherit=True), module.__dict__)
        verdict = nonce
    except BaseException as e:
        verdict = describe(e)
        if not isinstance(e, SystemExit):
            e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next  # without the frame of this function
            show(type(e), e, e.__traceback__)
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()  # pyrefly: ignore[missing-attribute]
        except BaseException:  # closed or replaced by the code, or its reader is gone
            continue
    write(status, verdict)
    leave(0)


def describe(e: BaseException) -> bytes:
    """'AssertionError: text' in at most 500 bytes. The text is the code's own, and may fail in any way."""
    try:
        text = str(e)
    except BaseException:
        text = ""
    return f"{type(e).__name__}: {text}".rstrip(": ").encode(errors="replace")[:500]


def enter_namespaces(on: dict[str, bool], off: list[str], root: bool) -> None:
    """New namespaces for this process and, for pids, its children. An ordinary user needs a user namespace first."""
    on["user_namespace"] = not root and "user_namespace" not in off and user_namespace()
    for name in ("mount_namespace", "pid_namespace", "net_namespace", "ipc_namespace", "uts_namespace"):
        on[name] = name not in off and unshare(name)


def unshare(name: str) -> bool:
    return MACHINE != "" and LIBC.unshare(CLONE[name]) == 0


def user_namespace() -> bool:
    """Enter a user namespace where this user is itself. Without the map no file could be made in it."""
    uid, gid = os.getuid(), os.getgid()
    if not unshare("user_namespace"):
        return False
    lines = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    try:
        for name, line in lines.items():
            with open(f"/proc/self/{name}", "w") as f:
                f.write(line)
    except OSError:
        return False
    return True


def lock_in(on: dict[str, bool], off: list[str], root: bool, cpu_s: int, memory: int) -> None:
    """All that binds this process for good, in the order the kernel needs it. Fills in `on`."""
    os.umask(0o022)
    folders = readable_folders()
    on["mount_namespace"] = on["mount_namespace"] and private_root(folders)
    ruleset = landlock_rules(["/"] if on["mount_namespace"] else folders) if "landlock" not in off else -1
    if root:
        may_drop = "unprivileged" not in off and (on["mount_namespace"] or open_to_all(folders))
        on["unprivileged"] = may_drop and drop_root()
        on["user_namespace"] = on["unprivileged"] and "user_namespace" not in off and unshare("user_namespace")
    limits = {"AS": memory, "CPU": cpu_s, "FSIZE": FILE_BYTES, "NPROC": PROCESSES, "NOFILE": OPEN_FILES, "CORE": 0}
    done = [set_limit(name, value) for name, value in limits.items()]  # each, whether or not another was refused
    on["rlimits"] = all(done)
    on["unprivileged"] = drop_capabilities() and on.get("unprivileged", True)
    on["no_new_privs"] = prctl(PR_SET_NO_NEW_PRIVS, 1)
    on["dies_with_parent"] = on["dies_with_parent"] and prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    on["landlock"] = ruleset >= 0 and call(LANDLOCK_RESTRICT, ruleset, 0) == 0
    if ruleset >= 0:
        os.close(ruleset)
    on["seccomp"] = "seccomp" not in off and filter_calls(files_in_view=not on["mount_namespace"])


def readable_folders() -> list[str]:
    """What Python imports and loads from: its own library folders and the system's, as far as they exist."""
    own = [f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib", os.path.dirname(os.__file__)]
    found = [*own, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    return [path for path in dict.fromkeys(found) if os.path.isdir(path)]


def private_root(folders: list[str]) -> bool:
    """Make the working folder the root of the file system: `folders` read-only, four devices, an empty /tmp.

    All of it is in memory and ends with the process; nothing is written to a disk. False where the kernel refuses.
    """
    root = os.getcwd()
    if not mount("none", "/", MS_REC | MS_PRIVATE):
        return False
    if not mount("tmpfs", root, MS_NOSUID | MS_NODEV, "tmpfs", "size=1m,mode=755"):
        return False
    try:
        os.chdir(root)
        os.makedirs("tmp")
        ready = all(map(show_folder, folders)) and all(map(show_device, DEVICES))
        options = f"size={DISK_BYTES},nr_inodes={DISK_FILES},mode=1777"
        ready = ready and mount("tmpfs", "tmp", MS_NOSUID | MS_NODEV, "tmpfs", options)
        ready = ready and mount("none", root, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
        ready = ready and machine_call(PIVOT_ROOT, b".", b".") == 0
    except OSError:
        ready = False
    if not ready:
        LIBC.umount2(root.encode(), MNT_DETACH)
        os.chdir(root)
        return False
    if LIBC.umount2(b".", MNT_DETACH) != 0:  # the old root lies over the new one
        raise RuntimeError("the old root cannot be unmounted")
    os.chdir("/tmp")
    return True


def show_folder(path: str) -> bool:
    """Bind `path` read-only at the same place under the working folder; a link (/lib on most systems) is copied."""
    target = path[1:]
    if os.path.lexists(target):
        return True  # lies in a folder already shown
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return True
    os.mkdir(target)
    if not mount(path, target, MS_BIND | MS_REC):
        return False
    kept = sum(ms for st, ms in ST_TO_MS.items() if os.statvfs(target).f_flag & st)
    return mount("none", target, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def show_device(path: str) -> bool:
    os.makedirs("dev", exist_ok=True)
    os.close(os.open(path[1:], os.O_CREAT | os.O_WRONLY))
    return mount(path, path[1:], MS_BIND)


def mount(source: str, target: str, flags: int, kind: str = "", options: str = "") -> bool:
    text = [x.encode() or None for x in (source, target, kind, options)]
    return LIBC.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3]) == 0


def landlock_rules(folders: list[str]) -> int:
    """Descriptor of a ruleset: read `folders`, write only in the working folder, no TCP, no signal to outside.

    -1 where the kernel has no Landlock. LANDLOCK_RESTRICT puts it in force.
    """
    abi = call(LANDLOCK_CREATE, None, 0, 1)
    if abi < 1:
        return -1
    rights = (1 << 13) - 1 | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15  # linux/landlock.h, files
    attr = struct.pack("QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]  # files, TCP, scope
    ruleset = call(LANDLOCK_CREATE, attr, len(attr), 0)
    paths = dict.fromkeys(folders, LANDLOCK_READ)
    paths |= {path: LANDLOCK_DEVICE for path in DEVICES if os.path.exists(path)}
    paths |= {os.getcwd(): rights & ~LANDLOCK_NOT_IN_WORK}
    for path, allowed in paths.items():
        fd = os.open(path, os.O_PATH)
        done = call(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
        os.close(fd)
        if done != 0:
            return -1
    return ruleset


def open_to_all(folders: list[str]) -> bool:
    """Whether another user could read these folders: each one and all above it."""
    for path in folders:
        while path != "/":
            if os.stat(path).st_mode & 5 != 5:
                return False
            path = os.path.dirname(path)
    return True


def drop_root() -> bool:
    try:
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return False
    return True


def drop_capabilities() -> bool:
    """Clear all capability sets of this process. execve, which could give them back to root, is refused."""
    return machine_call(CAPSET, struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0


def set_limit(name: str, value: int) -> bool:
    """Set a resource limit for good. False where this system has none such, or refuses."""
    try:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    except (AttributeError, OSError, ValueError):
        return False
    return True


def filter_calls(files_in_view: bool) -> bool:
    """Refuse the system calls named above, for this process and for good."""
    arch = AUDIT_ARCH.get(MACHINE)
    if arch is None:
        return False
    column = list(AUDIT_ARCH).index(MACHINE)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000  # linux/seccomp.h
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # x32 numbers
    for numbers in [*DENIED.values(), *(DENIED_IN_VIEW.values() if files_in_view else ())]:
        if numbers[column]:
            program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | EPERM)]
    program += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, refuse | ENOSYS)]  # the C library then uses clone
    argument = [(load, 0, 0, 16)]  # low half of the first one
    program += [(equal, 0, 4, CLONE_CALL[column]), *argument, (any_bit, 1, 0, CLONE_THREAD)]
    program += [(give, 0, 0, refuse | EPERM), (give, 0, 0, allow)]
    for numbers, own in ((KILL, [os.getpid()]), (TGKILL, [os.getpid()]), (PRLIMIT, [0, os.getpid()])):
        program += [(equal, 0, len(own) + 3, numbers[column]), *argument]
        program += [(equal, len(own) - i, 0, pid) for i, pid in enumerate(own)]
        program += [(give, 0, 0, refuse | EPERM), (give, 0, 0, allow)]
    program.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    return prctl(PR_SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))


def prctl(option: int, *args: int | bytes) -> bool:
    values = [ctypes.c_ulong(x) if isinstance(x, int) else x for x in (*args, *[0] * (4 - len(args)))]
    return MACHINE != "" and LIBC.prctl(option, *values) == 0


def machine_call(numbers: tuple[int, int], *args: int | bytes) -> int:
    """A system call whose number depends on the machine; -1 on one not known here."""
    return call(numbers[list(AUDIT_ARCH).index(MACHINE)], *args) if MACHINE in AUDIT_ARCH else -1


def call(number: int, *args: int | bytes | None) -> int:
    if MACHINE == "":
        return -1
    return LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(x) if isinstance(x, int) else x for x in args))


if __name__ == "__main__":
    main()
