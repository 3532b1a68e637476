# The table of contents over scripts/; continuous integration calls the same scripts.
.PHONY: setup check test quickstart bench stubs

setup:          ## system packages, virtual environment
	scripts/setup --tests

check:          ## every gate and the tests that need no root
	scripts/test --quick

test:           ## everything, real containers included (root)
	scripts/test

quickstart:     ## the tour (root)
	scripts/quickstart

bench:          ## figures against runc, crun and bare gRPC (root, a quiet machine)
	benchmarks/run

stubs:          ## generate the gRPC stubs from proto/
	scripts/protoc
