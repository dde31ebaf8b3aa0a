# All targets install what they need. A fresh clone needs python3, make and a C++ compiler.
#   make chat    chat with the bundled model        make test    run the tests
#   make check   all checks, before a commit make wheel   build the wheel of this platform
#   make sanitize   the native kernels' fuzzer under the address, undefined-behaviour and thread sanitizers (needs cmake)
PYTHON ?= python3
BIN := .venv/bin
# Wheels of torch for Linux include gigabytes of CUDA: the tests use the CPU build, pinned in pyproject.toml.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# One process per core; a process without tests left takes some of another.
PYTEST := $(BIN)/python -m pytest -n logical --dist worksteal

.PHONY: chat test check format wheel sanitize clean
chat: .venv/chat.done
	@$(BIN)/tinychat

test: .venv/test.done
	$(PYTEST) $(TESTS)

check: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/dev.py links
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.metal' '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror
	$(PYTEST) $(TESTS)

format: .venv/test.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.metal' '*.cu' | xargs $(BIN)/clang-format -i

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

clean:
	rm -rf .venv build dist
