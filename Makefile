# All targets install what they need. A fresh clone needs python3, make and a C++ compiler.
#   make chat    chat with the bundled model        make test    run the tests
#   make check   what must be quiet before a commit make wheel   build the wheel of this platform
#   make lint    the part of it that runs no test    make cross   the native library for macOS and Windows
#   make sanitize   the native kernels' fuzzer under the address, undefined-behaviour and thread sanitizers (needs cmake)
PYTHON ?= python3
BIN := .venv/bin
# Wheels of torch for Linux include gigabytes of CUDA: the tests use the CPU build, pinned in pyproject.toml.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# For `make cross`. Each release of zig brings another clang: the version is fixed.
CROSS := ziglang==0.16.0 'cmake>=3.25,<5' ninja

# A process per core; one that is done takes tests from the others.
PYTEST := $(BIN)/python -m pytest -n logical --dist worksteal

.PHONY: chat test check lint cross format wheel sanitize clean
chat: .venv/chat.done
	@$(BIN)/tinychat

test: .venv/test.done
	$(PYTEST) $(TESTS)

check: lint cross
	$(PYTEST) $(TESTS)

NATIVE_FILES = git ls-files '*.cpp' '*.h' '*.metal' '*.cu' '*.cuh'
lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/dev.py links
	$(BIN)/mypy
	$(NATIVE_FILES) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m pytest tests/base/test_layers.py

# zig, CMake and ninja come from the package registry, so no system package is needed.
cross: .venv/cross.done
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/cross.py

format: .venv/test.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(NATIVE_FILES) | xargs $(BIN)/clang-format -i

wheel: .venv/test.done
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

# Exit code 2 of the fuzzer: this machine lacks the instruction set.
SANITIZERS := address,undefined thread
ISAS := scalar avx2 avxvnni avx512vnni neon neondot neoni8mm
sanitize:
	@mkdir -p build
	@for kind in $(SANITIZERS); do \
	  cmake -S backends/cpu -B build/$$kind -DTINYCHAT_TOOLS=ON \
	    -DCMAKE_CXX_FLAGS="-g -fsanitize=$$kind -fno-sanitize-recover=all" >build/$$kind.log && \
	  cmake --build build/$$kind --target fuzz >>build/$$kind.log || exit 1; \
	  for isa in $(ISAS); do \
	    echo "$$kind, $$isa"; build/$$kind/fuzz $$isa 1 100 3; case $$? in 0|2) ;; *) exit 1;; esac; \
	  done; \
	done

# The install builds the native library, so its sources are prerequisites.
NATIVE := pyproject.toml $(shell find backends/cpu -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.venv/python.done:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tinychat needs Python 3.10 or newer")'
	@$(PYTHON) -m venv .venv || { echo "python3 cannot make a venv: on Debian, apt install python3-venv" >&2; exit 1; }
	@touch $@

.venv/chat.done: .venv/python.done $(NATIVE)
	@echo "Setting up .venv (about a minute, once) …"
	@$(PIP) -e .
	@touch $@
	@echo "Done. From now on '. .venv/bin/activate' makes tinychat a command of your shell."

.venv/test.done: .venv/python.done $(NATIVE)
	@echo "Setting up .venv for the tests (a few minutes, once) …"
	$(PIP) -e '.[test]'
	@touch $@ .venv/chat.done

.venv/cross.done: .venv/python.done pyproject.toml
	@echo "Fetching zig, CMake and ninja (once) …"
	$(PIP) $(CROSS)
	@touch $@

clean:
	rm -rf .venv build dist
