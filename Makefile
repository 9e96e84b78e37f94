# 'make test' sets up what is missing and runs everything.

MODULES = . examples
LINT    = go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
FUZZ    = FuzzBearerKey:. FuzzDecoder:./internal/sealed FuzzParse:./internal/snapshot
FUZZTIME = 50000x

.PHONY: test servers lint fuzz bench demo

test: servers
	set -e; for module in $(MODULES); do (cd $$module && go vet ./... && go test -race -shuffle=on -count=1 ./...); done

# Installs the PostgreSQL and Redis that tests run on, where they are missing.
servers:
	.ci/install

lint:
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	set -e; for module in $(MODULES); do (cd $$module && go mod tidy -diff && $(LINT) run --config $(CURDIR)/.golangci.yml ./...); done

fuzz:
	set -e; for f in $(FUZZ); do go test -run='^$$' -fuzz="^$${f%%:*}$$" -fuzztime=$(FUZZTIME) -fuzzminimizetime=100x $${f#*:}; done

bench: servers
	go test -run='^$$' -bench=. -benchmem .

demo:
	go run ./cmd/apikey demo
