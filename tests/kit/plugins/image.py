"""An image plugin: root file systems are copies of a directory.

Settings: `image`; `maximus`, the id that root gets; `shift`, added to every id; `overlay`, mount one over the copy.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
from program import PLACE, SETTINGS, begin, finish

STORE = PLACE / "store"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--store")
    verbs = parser.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create")
    create.add_argument("--disk-limit-size-bytes", type=int)
    create.add_argument("--exclude-image-from-quota", action="store_true")
    create.add_argument("--username")
    create.add_argument("--password")
    create.add_argument("uri")
    create.add_argument("id")
    for verb in ("delete", "stats"):
        verbs.add_parser(verb).add_argument("id")
    verbs.add_parser("capacity")
    given = parser.parse_args()
    extra = begin(given.verb, **{k: v for k, v in vars(given).items() if k != "verb"})
    globals()[given.verb](given, extra)
    finish()


def create(given, extra):
    root = STORE / given.id / "rootfs"
    if root.exists():
        print(f"Image for id '{given.id}' already exists. Image IDs must be unique.")
        finish(1)
    if given.uri.endswith("missing"):
        print(f"{given.uri} does not exist or you do not have permissions to see it.")
        finish(1)
    STORE.mkdir(exist_ok=True)
    STORE.chmod(0o755)
    root.parent.mkdir(mode=0o755)
    shutil.copytree(SETTINGS["image"], root, symlinks=True)
    for parent, names, files in os.walk(SETTINGS["image"]):
        for name in ("", *names, *files):
            source = os.path.join(parent, name)
            found = os.lstat(source)
            target = os.path.join(root, os.path.relpath(source, SETTINGS["image"]))
            os.chown(target, to_host(found.st_uid), to_host(found.st_gid), follow_symlinks=False)
            if not os.path.islink(target):
                os.chmod(target, found.st_mode & 0o7777)
    (root / "tmp/made-by-plugin").write_text(given.uri)
    if SETTINGS.get("overlay"):
        for name in ("upper", "work"):
            (root.parent / name).mkdir()
        found = root.stat()
        os.chown(root.parent / "upper", found.st_uid, found.st_gid)
        options = f"lowerdir={root},upperdir={root.parent}/upper,workdir={root.parent}/work"
        subprocess.run(["mount", "-t", "overlay", "x", "-o", options, root], check=True, timeout=20)
    answer = {
        "ociVersion": "1.0.2",
        "root": {"path": str(root)},
        "process": {"env": ["FROM_PLUGIN=yes", "PATH=/usr/bin:/bin:/sbin"]},
        "mounts": SETTINGS.get("mounts", []),
        **extra,
    }
    print(json.dumps(answer))
    print('{"message":"grew a root file system","log_level":1}', file=sys.stderr)


def to_host(number):
    """As the Garden reference maps ids, or shifted, or as they are."""
    if SETTINGS.get("maximus") and number == 0:
        return SETTINGS["maximus"]
    return number + SETTINGS.get("shift", 0)


def delete(given, extra):
    subprocess.run(
        ["umount", STORE / given.id / "rootfs"], stderr=subprocess.DEVNULL, check=False, timeout=20
    )
    shutil.rmtree(STORE / given.id, ignore_errors=True)


def stats(given, extra):
    root = STORE / given.id / "rootfs"
    if not root.exists():
        print("image not found: " + given.id)
        finish(1)
    used = sum(path.lstat().st_size for path in root.rglob("*"))
    image = sum(path.lstat().st_size for path in Path(SETTINGS["image"]).rglob("*"))
    usage = {"total_bytes_used": used, "exclusive_bytes_used": max(0, used - image)}
    print(json.dumps({"disk_usage": usage, **extra}))


def capacity(given, extra):
    print(json.dumps({"capacity": 12_345_678_912, **extra}))


main()
