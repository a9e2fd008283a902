"""Runs the command line and writes down what it does beyond its own folders.

    python -m tests.audited RECORD.json FOLDER:FOLDER batch ...

`watch` sees what goes through the interpreter: a program started, a connection, a class
that a pickle names, a file changed outside the folders. What C++ code does it does not
see; for files, callers look into the folders afterwards.
"""

import json
import os
import sys

# Whatever begins with one of these is written down.
FORBIDDEN = (
    *("pickle.", "marshal.dump", "os.system", "os.exec", "os.posix_spawn", "os.spawn"),
    *("os.fork", "pty.", "subprocess.", "socket.", "urllib.", "http.", "ftplib."),
    *("smtplib.", "poplib.", "imaplib.", "telnetlib.", "webbrowser.", "syslog."),
)
# These are if a path lies outside: places of paths among the arguments, each with that
# of the folder it is relative to.
CHANGING = {
    **dict.fromkeys(("os.rename", "os.link"), ((0, 2), (1, 3))),
    **dict.fromkeys(("os.remove", "os.rmdir"), ((0, 1),)),
    **dict.fromkeys(("os.mkdir", "os.chmod"), ((0, 2),)),
    **dict.fromkeys(("os.chown", "os.utime"), ((0, 3),)),
    **dict.fromkeys(("os.truncate", "os.setxattr", "shutil.rmtree"), ((0, None),)),
    "os.symlink": ((1, 2),),
}
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(folders):
    """Starts to watch, for good.

    Gives the list that grows: [package that did it, or "", event, arguments].
    """
    inside = tuple(os.path.realpath(f).rstrip("/") + "/" for f in folders)
    seen = []

    def outside(path, folder=None):
        if isinstance(path, int) or path is None:  # a descriptor, opened before
            return False
        path = os.fsdecode(path)
        if folder is not None and folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        path = os.path.abspath(path)
        real = os.path.join(
            os.path.realpath(os.path.dirname(path)), os.path.basename(path)
        )
        return real != os.devnull and not f"{real}/".startswith(inside)

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            bad = bool((flags or 0) & _WRITING) and outside(path)
        elif event in CHANGING:
            bad = any(
                outside(arguments[i], None if j is None else arguments[j])
                for i, j in CHANGING[event]
            )
        else:
            bad = event.startswith(FORBIDDEN)
        if bad:
            seen.append([_package(), event, repr(arguments)[:300]])

    sys.addaudithook(hook)
    return seen


def _package():
    """Installed package of the innermost caller that is not Python's own library."""
    site = f"{os.sep}site-packages{os.sep}"
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if site in name:
            return name.rpartition(site)[2].split(os.sep)[0].removesuffix(".py")
        if name.startswith(_ROOT):
            return ""
        frame = frame.f_back
    return ""


def main(record, folders, *words):
    file = open(record, "w")
    seen = watch(folders.split(":"))
    from unireg_jax import __main__ as cli  # here: it is watched, too

    try:
        code = cli.main(list(words))
    finally:
        with file:
            json.dump({"seen": seen, "modules": _modules()}, file)
    return code


def _modules():
    """Name -> file of the top-level modules that were imported."""
    names = {name.partition(".")[0] for name in sys.modules}
    return {
        name: getattr(sys.modules[name], "__file__", None)
        for name in sorted(names)
        if name in sys.modules and name not in sys.stdlib_module_names
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
