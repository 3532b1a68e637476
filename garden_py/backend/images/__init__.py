"""Images: fetched by skopeo, unpacked by us, kept layer by layer, shared by all containers.

references, mirrors, passwords     sources.py
one fetch, a process of its own    puller.py (talks to skopeo through proxy.py, starts an unpacker for each layer)
one layer, a process of its own    unpack.py
what is on disk, and who uses it   store.py
all together, for the backend      images.py
"""
