# 'make test' sets up what is missing and runs all the tests.

MODULES  = . examples otel bench cmd/apikey/browsertest
LINT     = go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
FUZZ     = FuzzKey:./internal/bearer FuzzDecoder:./internal/sealed FuzzParse:./internal/snapshot
FUZZTIME = 50000x

MUTANTS  = internal/batch internal/snapshot internal/sealed internal/readthrough internal/feed admin
GREMLINS = go run github.com/go-gremlins/gremlins/cmd/gremlins@v0.6.0
SOAK     = 2m
BASE     = $(shell git describe --tags --abbrev=0)
APIDIFF  = go run golang.org/x/exp/cmd/apidiff@v0.0.0-20260410095643-746e56fc9e2f
BENCHSTAT = go run golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
FLOOD    = 1000000
COMPARE  = -write -cold=500 -stampede=1000 -revokings=20 -limit=1m \
	-load.keys=100000 -storm.keys=10000 -storm.rate=4000 -storm.for=5s \
	-fleet.sizes=50,100,200,400 -fleet.for=10s

.PHONY: test servers lint fuzz mutants soak flood bench screenshot api benchstat api-beside benchstat-beside demo

test: export CI = true
test: servers
	set -e; for module in $(MODULES); do (cd $$module && go vet ./... && go test -race -shuffle=on -count=1 -parallel=8 ./...); done

# Installs what the tests need and this machine lacks.
servers:
	.ci/install

lint:
	unformatted=$$(gofmt -l .); echo "$$unformatted"; test -z "$$unformatted"
	set -e; for module in $(MODULES); do (cd $$module && go mod tidy -diff && $(LINT) run --config $(CURDIR)/.golangci.yml ./...); done

fuzz:
	set -e; for f in $(FUZZ); do go test -run='^$$' -fuzz="^$${f%%:*}$$" -fuzztime=$(FUZZTIME) -fuzzminimizetime=100x $${f#*:}; done

# Changes single lines of packages, and says which changes their own tests do not notice. It takes long.
mutants: servers
	set -e; for p in $(MUTANTS); do $(GREMLINS) unleash --workers 1 --timeout-coefficient 20 ./$$p; done

# Random faults and random changes under load, for as long as SOAK says.
soak: servers
	go test ./systemtest -count=1 -run='^TestSoak$$' -timeout=0 -v -soak.for=$(SOAK)

# As many made-up keys as FLOOD says.
flood: servers
	go test ./systemtest -count=1 -run='^TestFlood$$' -timeout=0 -v -flood.keys=$(FLOOD)

# Benchmarks of the package, then of its peers beside it: with -write, into bench/README.md.
bench: servers
	go test -run='^$$' -bench=. -benchmem .
	cd bench && go test -count=1 -run='^(TestCompare|TestHitRatio|TestLoad|TestStorm|TestFleet)$$' $(COMPARE) -timeout=0 -v .

# The picture of the demo's page.
screenshot: servers
	cd cmd/apikey/browsertest && go test -count=1 -run='^TestRevocation$$' . -args -screenshot=$(CURDIR)/docs/demo.png

# What the API has lost and gained since the last tag, and how fast a request is beside it.
api benchstat: .base
	set -e; trap 'git worktree remove --force .base; rm -f before.txt after.txt' EXIT; $(MAKE) -s $@-beside

api-beside:
	cd .base && $(APIDIFF) -m -w ../before.txt github.com/trackpilots/apikey
	$(APIDIFF) -m before.txt github.com/trackpilots/apikey

benchstat-beside:
	for n in 1 2 3 4 5 6; do \
		(cd .base && go test -run='^$$' -bench=BenchmarkAccept -benchtime=300ms .) >>before.txt; \
		go test -run='^$$' -bench=BenchmarkAccept -benchtime=300ms . >>after.txt; done
	$(BENCHSTAT) before.txt after.txt

.base:
	git worktree add -q -f .base $(BASE)

demo:
	go run ./cmd/apikey demo
