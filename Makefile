# Two commands on a fresh Debian 12 machine do everything: `make demo` and `make test`.
# Only python3 (3.11 or later) and make need to be there; the rest is installed when it is missing.

SHELL := /bin/bash
PYTHON ?= python3
# Where the virtual environment lives, and what is installed in it: `editable` is the tree itself, `wheel` the
# wheel built from it.  CI sets both, so that it tests what a user would install.
VENV ?= .venv
INSTALL ?= editable
BUILD_DIR := .cache/wheel

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
APT_GET := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qy -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300

# pyfuse3 is compiled against libfuse; qemu and e2fsprogs serve the demo and the tests; systemd brings
# systemd-analyze, which judges our unit; the tests run a libvirtd of their own, no service comes with these packages.
APT_PACKAGES := fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv \
	qemu-utils qemu-system-x86 e2fsprogs systemd \
	libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients python3-libvirt
# The peers and servers that the benchmarks compare with.
APT_PACKAGES_BENCH := nginx libnginx-mod-http-lua nbdkit python3-libnbd qemu-block-extra rclone curl fio \
	iproute2 mmdebstrap

LAZYIMG := $(VENV)/bin/lazyimg
# A shell's background job, or nohup, hands down SIGINT or SIGHUP as ignored; tests that send them would wait for ever.
PYTEST := env --default-signal $(VENV)/bin/pytest
# How many processes run the tests, each of them whole files; 1: none but pytest itself.
JOBS ?= 1
PARALLEL := $(if $(filter 1,$(JOBS)),,-n $(JOBS) --dist loadfile --no-loadscope-reorder)
PYTHON_FOLDERS := lazyimg tests benchmarks
SOURCES := $(shell find lazyimg -name '*.py')

.PHONY: setup demo test check format wheel bench-setup clean apt python

setup: $(VENV)/.stamp-$(INSTALL)

demo: setup
	$(LAZYIMG) demo

# The real Glance and Keystone have a virtual environment of their own, and so has Nova: their dependencies are not
# ours.
test: setup
	$(VENV)/bin/python tests/glance/setup_real.py & real=$$!; $(VENV)/bin/python tests/nova/setup_nova.py && wait $$real
	$(PYTEST) $(PARALLEL)

check: setup
	$(VENV)/bin/ruff format --check $(PYTHON_FOLDERS)
	$(VENV)/bin/ruff check $(PYTHON_FOLDERS)
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff format $(PYTHON_FOLDERS)
	$(VENV)/bin/ruff check --fix $(PYTHON_FOLDERS)

wheel: $(VENV)/bin/pip
	rm -rf $(BUILD_DIR) build
	$(VENV)/bin/pip wheel -q --no-deps --wheel-dir $(BUILD_DIR) .

bench-setup: setup
	@$(call apt_install,$(APT_PACKAGES_BENCH))

clean:
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lazyimg tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# ── how setup gets there ──

# $(call apt_install,PACKAGES): installs those that are missing; the package lists are read only if one is.
define apt_install
command -v dpkg-query >/dev/null || { echo "not Debian: lazyimg needs what is in $(1)"; exit 0; }; \
missing=; \
for package in $(1); do \
    [ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" = installed ] \
        || missing="$$missing $$package"; \
done; \
if [ -n "$$missing" ]; then \
    echo "installing$$missing"; \
    $(APT_GET) update && $(APT_GET) install --no-install-recommends $$missing; \
fi
endef

apt:
	@$(call apt_install,$(APT_PACKAGES))

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "lazyimg needs Python 3.11 or later; give one: make PYTHON=/path/to/python3.11"; exit 1; }

# pip is the last thing that appears: a venv that failed for want of python3-venv has no pip, and is made anew.
$(VENV)/bin/pip: | apt python
	$(PYTHON) -m venv $(VENV)

# The stamp makes a second run quick: only a change of what is installed installs again.
$(VENV)/.stamp-editable: pyproject.toml Makefile | apt $(VENV)/bin/pip
	$(VENV)/bin/pip install -q --retries 10 -e '.[dev]'
	rm -f $(VENV)/.stamp-*
	touch $@

$(VENV)/.stamp-wheel: pyproject.toml Makefile $(SOURCES) | apt $(VENV)/bin/pip
	$(MAKE) wheel
	$(VENV)/bin/pip install -q --retries 10 "$$(echo $(BUILD_DIR)/lazyimg-*.whl)[dev]"
	$(VENV)/bin/pip install -q --no-deps --force-reinstall $(BUILD_DIR)/lazyimg-*.whl
	rm -f $(VENV)/.stamp-*
	touch $@
