# Paddock. "make help" lists what there is to make.
#
# Everything is built by the go command from pinned versions: the product's in go.mod,
# the tools' in tools/go.mod. Nothing is fetched in any other way, except the system
# packages that .ci/packages names.

SHELL := bash
# The make of macOS (3.81) does not know .SHELLFLAGS: loops and pipes say "|| exit 1" and
# "set -o pipefail" themselves.
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

LINT    := .cache/golangci-lint
VULN    := .cache/govulncheck
STAT    := .cache/benchstat
VERDICT := .cache/verdict
DARWIN  := .cache/darwincheck
API     := .cache/apicheck

# The modules that are tested and linted: the product, the end-to-end tests, the tools.
MODULES := . $(patsubst %/go.mod,%,$(wildcard e2e/go.mod)) tools

# The driver of Macs is tested and linted against a stand-in for Apple's framework, too:
# where these are set, the go command takes the stand-in for the real bindings.
STANDIN      := GOWORK=$(CURDIR)/vm/vz/standin.work
STANDIN_TAGS := vzstandin
# A test that only that build has: without it, all of that proof would be missing unseen.
STANDIN_NEED := github.com/paddock-ci/paddock/vm/vz.TestConformance

# The go command stamps what it builds by asking git, which refuses in a checkout that
# another user owns (a container's mount). So git is asked here, and where it refuses the
# programs call themselves "devel".
export GOFLAGS := $(strip $(GOFLAGS) -buildvcs=false)
VERSION = $(shell git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null || git describe --always --exclude '*' --dirty 2>/dev/null | sed 's/^/devel-/')

FUZZTIME ?= 30s
COUNT    ?= 1

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: build ## run 12 jobs on three nodes against a simulated GitHub; DRIVER=qemu: in real VMs; ARGS="--json" for machines
	@bin/paddock-demo $(if $(DRIVER),-driver $(DRIVER)) $(ARGS)

.PHONY: build
build: ## build the programs into bin/
	@mkdir -p bin
	go build -ldflags "-X main.version=$(VERSION)" -o bin/ ./cmd/...

.PHONY: guest
guest: ## build the agent that runs inside machines into bin/guest/, for Linux and macOS
	@mkdir -p bin/guest
	@for target in linux/arm64 linux/amd64 darwin/arm64; do \
		CGO_ENABLED=0 GOOS=$${target%/*} GOARCH=$${target#*/} go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" \
			-o bin/guest/paddock-guest-$${target%/*}-$${target#*/} ./cmd/paddock-guest || exit 1; \
	done
	@ls -l bin/guest

.PHONY: test
test: packages $(VERDICT) ## vet and test everything with the race detector; with CI=true a skip is a failure
	go vet ./...
	$(VERDICT) $(MODULES:%=-dir %) -at-once 2 -need $(STANDIN_NEED) -also "$(STANDIN) -tags $(STANDIN_TAGS) -race -timeout 20m ./vm/vz/..." -- -race -timeout 20m ./...

.PHONY: packages
packages: ## install the system packages that the tests need (Debian, as root; else says which)
	@.ci/packages

.PHONY: e2e
e2e: packages $(VERDICT) ## run only the end-to-end tests, with a real runner
	@test -f e2e/go.mod || { echo "e2e: there is no e2e module in this tree" >&2; exit 1; }
	$(VERDICT) -dir e2e -- -race -timeout 20m -v ./...

.PHONY: lint
lint: $(LINT) darwin ## linters, floors, formatting, checksums, and a build for macOS
	@unformatted=$$(gofmt -l .) && test -z "$$unformatted" || { echo "gofmt these: $$unformatted" >&2; exit 1; }
	@for module in $(MODULES) vm/vz/standin; do \
		echo "golangci-lint run ($$module)"; \
		(cd $$module && $(CURDIR)/$(LINT) run --config $(CURDIR)/.golangci.yml ./...) || exit 1; \
	done
	$(STANDIN) $(LINT) run --build-tags $(STANDIN_TAGS) ./vm/vz/...
	go test -count 1 .
	go mod verify
	GOOS=darwin GOARCH=arm64 CGO_ENABLED=0 go build ./...

.PHONY: darwin
darwin: $(DARWIN) $(API) ## check the code for Macs on any system: types, analysers, and the stand-in's API
	$(DARWIN)
	$(API)

.PHONY: sign
sign: ## on a Mac: sign bin/paddock, or the framework refuses it every machine
	@test "$$(uname -s)" = Darwin || { echo "sign: signatures are made on macOS" >&2; exit 2; }
	codesign --force --sign - --entitlements cmd/paddock/paddock.entitlements bin/paddock

.PHONY: bench
bench: packages $(STAT) ## run the benchmarks (COUNT=5 for a spread); figures go to .cache/bench.txt
	set -o pipefail; go test -run '^$$' -bench . -benchmem -count $(COUNT) -timeout 60m ./... | tee .cache/bench.txt
	$(STAT) .cache/bench.txt

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME (30s each)
	@.ci/fuzz $(FUZZTIME)

.PHONY: vuln
vuln: $(VULN) ## look for known vulnerabilities (needs vuln.go.dev)
	$(VULN) ./...

.PHONY: tidy-check
tidy-check: ## say what "go mod tidy" would change
	@for module in $(MODULES); do echo "go mod tidy -diff ($$module)"; (cd $$module && go mod tidy -diff) || exit 1; done

.PHONY: clean
clean: ## remove what make has built
	rm -rf bin .cache

# The tools are rebuilt when their pinned versions change.
$(LINT): tools/go.mod tools/go.sum
	go build -C tools -o ../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

$(VULN): tools/go.mod tools/go.sum
	go build -C tools -o ../$@ golang.org/x/vuln/cmd/govulncheck

$(STAT): tools/go.mod tools/go.sum
	go build -C tools -o ../$@ golang.org/x/perf/cmd/benchstat

$(VERDICT): $(wildcard tools/verdict/*.go)
	go build -C tools -o ../$@ ./verdict

$(DARWIN) $(API): .cache/%: tools/go.mod tools/go.sum $(wildcard tools/darwincheck/*.go tools/apicheck/*.go tools/foreign/*.go)
	go build -C tools -o ../$@ ./$*
