"""A small digits data set and what a folder holds, for tests of the data set's files."""

SMALL = {"train": 6, "val": 4, "size": 64, "progress": False}


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
