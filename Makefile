# swtpm-prop: demo, tests, and installation on this host. Works in a clone in any place; run it as root.
#
#   make demo      a guest with property PCRs, from nothing, and its move to another host, on libvirt hosts of their own
#   make test      every test, on real parts
#   make check     style, types, import rules and the quick tests
#   make bench     side-by-side measurements
#   make install   put the product into this host's libvirt
#
# The package is installed below PREFIX and tested there: the user that swtpm runs as must be able to read it, and it
# cannot read a clone below /root. Tests and laboratory come from the clone.

PREFIX ?= /opt/swtpm-prop-dev
HOST_PREFIX ?= /opt/swtpm-prop
PYTHON := /usr/bin/python3

.DELETE_ON_ERROR:
.PHONY: help demo test check bench install setup clean
MAKEFLAGS += --no-print-directory --no-builtin-rules

SOURCES := setup.py setup.cfg pyproject.toml README.md \
	$(sort $(shell find swtpm_prop -type f ! -path '*/__pycache__/*' ! -name '*.so'))
DEBIAN := $(shell sha256sum packaging/debian-packages.txt | cut -c1-16)
STATE := $(shell { pwd; cat $(SOURCES); } | sha256sum | cut -c1-16)
BIN := $(PREFIX)/venv/bin
SETUP := $(PREFIX)/package-$(STATE)

# To make a virtual environment in directory $(1) with this package and what it needs ($(2): extras). Nobody but root
# may write there and everybody may read. What an earlier build left in build/ would be installed with it.
define virtual_environment
	@umask 022; test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	@umask 022; $(1)/bin/pip install -qq 'setuptools >= 68' wheel
	@umask 022; rm -rf build; $(1)/bin/pip install -qq --no-build-isolation '.$(2)'; status=$$?; rm -rf build *.egg-info; exit $$status
endef

# To install what is missing of the packages that the shell command $(1) lists.
define debian_packages
	@missing=; for name in $$($(1) | grep -v '^#'); do \
		dpkg-query -W -f '$${db:Status-Status}' $$name 2>/dev/null | grep -q installed || missing="$$missing $$name"; \
	done; \
	[ -z "$$missing" ] || { echo "-> Debian packages:$$missing"; \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
		apt-get -qq install -y --no-install-recommends $$missing >/dev/null; }
endef

help:
	@sed -n '3,7s/^# *//p' Makefile

demo: $(SETUP)
	@$(BIN)/python -P -m lab.demo

test: $(SETUP)
	@$(BIN)/pytest

check: $(SETUP)
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && echo "style: ok"
	@$(BIN)/mypy
	@$(BIN)/lint-imports | tail -1
	@shellcheck -s sh hooks/* && shellcheck .ci/run && echo "shell scripts: ok"
	@$(BIN)/pytest -q -m "not fault and not root" tests/unit tests/fuzz

bench: $(SETUP)
	@for program in benchmarks/*.py; do $(BIN)/python -P -m benchmarks.$$(basename $$program .py) || exit 1; done

setup: $(SETUP)

$(SETUP): $(PREFIX)/debian-$(DEBIAN)
	@echo "-> Python packages in $(PREFIX)/venv (a minute the first time)"
	@rm -f $(PREFIX)/package-*
	$(call virtual_environment,$(PREFIX)/venv,[test])
	@# Last in the search path: lab, tests and benchmarks come from this clone, swtpm_prop does not.
	@pwd > $$(echo $(PREFIX)/venv/lib/python3*/site-packages)/clone.pth
	@touch $@

$(PREFIX)/debian-$(DEBIAN):
	$(call debian_packages,cat packaging/debian-packages.txt)
	@umask 022; mkdir -p $(PREFIX) && touch $@

install:
	$(call debian_packages,sed '/^# tests/$(comma)$$d' packaging/debian-packages.txt)
	@echo "-> Python packages in $(HOST_PREFIX)"
	$(call virtual_environment,$(HOST_PREFIX),)
	@umask 022; $(HOST_PREFIX)/bin/python -m swtpm_prop.cli.manual $(HOST_PREFIX)/share
	@$(HOST_PREFIX)/bin/swtpm-prop install

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

comma := ,
