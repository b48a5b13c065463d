# Whimbrel: what people and CI call. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help setup setup-bench build guest demo bench bench-virsh test lint model

CARGO ?= cargo
# Namespaces, taps and bridges need root: the demo, and the tests that use them, run through sudo where we are not root.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env)
# All features everywhere, so that checks, tests and the binary under test share one build.
EVERYTHING := --workspace --all-targets --all-features --locked

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: ## install the Debian packages that are missing, fetch a second QEMU and the test guest's kernel
	@scripts/setup

setup-bench: ## the same, and install libvirt, which the bench measures beside us
	@scripts/setup bench

build: ## build the release binary, target/release/whimbrel
	@$(CARGO) build --release --locked --package whimbrel

guest: ## build the program that is init in the test guest
	@scripts/guest

demo: setup build guest ## see it work: a VM moves twice between three hosts on this machine
	@$(SUDO) target/release/whimbrel demo

bench: setup-bench build guest ## measure what a migration costs, beside virsh too: tables, and JSON in target/bench/
	@$(CARGO) build --release --locked --package whimbrel-bench
	@$(SUDO) target/release/whimbrel-bench $(ONLY) $(BENCH)

bench-virsh: ONLY := --only virsh
bench-virsh: bench ## the comparison with virsh alone; BENCH=--quick tries it

test: setup lint guest ## run all checks and tests, those with real QEMU included
	@export $(if $(SUDO),CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(SUDO)"); \
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --workspace --all-features --locked; \
	else \
		$(CARGO) build --workspace --all-features --locked --examples; \
		$(CARGO) test --workspace --all-features --locked --lib --bins --tests; \
	fi

# A toolchain without rustfmt or clippy can still run the tests; CI has both, and does not let them be missing. Links to
# private items are welcome: the documentation is for who works on the code.
lint: ## check the format, clippy's warnings and the links in the documentation
	@have() { $(CARGO) "$$1" --version >/dev/null 2>&1 || { echo "cargo $$1 is not installed: not checked"; [[ -z $${CI:-} ]] || exit 1; false; }; }; \
	if have fmt; then $(CARGO) fmt --all --check; fi; \
	if have clippy; then $(CARGO) clippy --quiet $(EVERYTHING) -- --deny warnings; fi; \
	RUSTDOCFLAGS="--deny warnings --allow rustdoc::private-intra-doc-links" $(CARGO) doc --quiet --workspace --all-features --locked --no-deps --document-private-items

model: ## explore the handoff's rules exhaustively, and every planted bug
	@$(CARGO) run --release --locked --package whimbrel-migration --example explore
