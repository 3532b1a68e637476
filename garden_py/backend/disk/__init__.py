"""Disk space of containers: the writable layer of each is a volume that the file system can count and limit.

which file system can do what    driver.py, btrfs.py, project.py
a store of our own on a loop     store.py
the volumes of one server        volumes.py
"""
