"""The process in which one program of a model runs. Python's own modules alone; nothing of ours.

    python -I -S -B rewards/sandbox.py < TASK

TASK is JSON: `program`, `tests`, `token`, `isolated`, `root` (an empty folder), `seconds`,
`memory`, `disk` (bytes), `processes`. On stdout come `ready` and, where the tests passed, the
token; or `refused` and why no program can run here.

This process, the runner, stays outside. With `isolated` it takes new namespaces: of users, so that
no right of yours is left; of the network, in which nothing is reachable; of processes, which the
kernel ends together; of mounts, where the system and Python can be read and a small folder in
memory can be written. The program runs in a child without privileges. As root, the child is the
user `nobody`, as the kernel holds root to no number of processes.
"""

import ctypes
import json
import os
import resource
import signal
import sys

# What a program sees beside Python's own folder.
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
NOBODY = 65534
# linux/sched.h, linux/mount.h, linux/prctl.h; numbers of calls that are the same everywhere.
NEW_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000 | 0x04000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
READ_ONLY, NO_SUID = 1, 2
SET_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES = 1, 38
CAPABILITY_VERSION = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    """Raises OSError: a call of the C library failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def main() -> int:
    """Run a task; returns the exit status."""
    task = json.loads(sys.stdin.buffer.read())
    output = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.close(null)
    try:
        if task["isolated"]:
            enter_namespaces()
            change_root(task["root"], task["disk"])
        # Until a child ends, its signal waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        child = os.fork()
        if child == 0:
            give_up_rights(task)
            judge(task, output)
    except (OSError, ValueError) as error:
        os.write(output, f"refused\n{error}\n".encode())
        return 1
    # The end of the first process of a namespace ends all others in it.
    if signal.sigtimedwait({signal.SIGCHLD}, task["seconds"]) is None:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 0


def enter_namespaces() -> None:
    """Take new namespaces. Raises OSError: the system allows none."""
    outside, (ready, go) = os.getpid(), os.pipe()
    user, group = os.geteuid(), os.getegid()
    helper = os.fork() if user == 0 else 0
    if user == 0 and helper == 0:
        # Only a process outside may map the user nobody.
        os.read(ready, 1)
        written = write_maps(outside, f"0 0 1\n1 {NOBODY} 1\n", f"0 0 1\n1 {NOBODY} 1\n")
        os._exit(0 if written else 1)
    checked(libc.unshare(NEW_NAMESPACES), "unshare")
    os.write(go, b".")
    if user == 0:
        if os.waitpid(helper, 0)[1]:
            raise OSError("the user nobody cannot be mapped")
    elif not write_maps(outside, f"0 {user} 1\n", f"0 {group} 1\n", deny=True):
        raise OSError("the user cannot be mapped")
    os.close(ready)
    os.close(go)


def write_maps(process: int, users: str, groups: str, deny: bool = False) -> bool:
    """Say which users a namespace has; whether the system allows it."""
    try:
        if deny:
            write(f"/proc/{process}/setgroups", "deny")
        write(f"/proc/{process}/uid_map", users)
        write(f"/proc/{process}/gid_map", groups)
    except OSError:
        return False
    return True


def write(path: str, text: str) -> None:
    """Write a file at once."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def change_root(root: str, size: int) -> None:
    """See the system and Python alone, to read, and an empty folder in memory, to write."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", 0, f"size={size},nr_inodes=4096,mode=755")
    for path in (*SYSTEM, os.path.realpath(sys.base_prefix)):
        show(path, root)
    os.makedirs(root + "/dev")
    show("/dev/null", root, change=False)
    os.mkdir(root + "/tmp")
    os.chmod(root + "/tmp", 0o777)
    os.chroot(root)
    os.chdir("/tmp")


def show(path: str, root: str, change: bool = True) -> None:
    """Let a path be seen under a new root, to read alone."""
    place = root + path
    if os.path.lexists(place) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.mkdir(place)
    else:
        write(place, "")
    mount(path, place, None, MS_BIND | MS_REC)
    if change:
        # Set, clear, propagation, user namespace.
        attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID, 0, 0, 0)
        result = libc.syscall(
            MOUNT_SETATTR, AT_FDCWD, place.encode(), AT_RECURSIVE, attributes, len(attributes) * 8
        )
        checked(result, f"read-only {path}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2). Raises OSError."""
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    result = libc.mount(*texts, ctypes.c_ulong(flags), data.encode())
    checked(result, f"mount {target}")


def give_up_rights(task: dict) -> None:
    """The child's limits; then nothing that it could raise them with."""
    if task["isolated"] and os.getuid() == 0 and is_mapped(1):
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    checked(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    checked(libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    if task["isolated"]:
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        checked(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    seconds = int(task["seconds"]) + 1
    for limit, value in (
        (resource.RLIMIT_AS, task["memory"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, task["disk"]),
        (resource.RLIMIT_NPROC, task["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def is_mapped(user: int) -> bool:
    """Whether this namespace has a user; else there is one user alone, who is not root outside."""
    try:
        os.chown("/tmp", user, user)
    except OSError:
        return False
    return True


def judge(task: dict, output: int) -> None:
    """Run the program, then the tests in its names; say the token where nothing was raised."""
    os.write(output, b"ready\n")
    names = {"__name__": "program"}
    try:
        exec(compile(task["program"], "<program>", "exec"), names)
        exec(compile(task["tests"], "<tests>", "exec"), names)
    except BaseException:
        os._exit(1)
    os.write(output, task["token"].encode())
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
