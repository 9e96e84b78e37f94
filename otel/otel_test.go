package otel_test

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/alicebob/miniredis/v2"
	promclient "github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/apikeytest"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/otel"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// A service is a middleware under observation.
type service struct {
	store *apikeytest.Store
	auth  *apikey.Middleware
	trace *trace.TracerProvider
	spans *tracetest.SpanRecorder
}

func newService(t *testing.T, reader metric.Reader) *service {
	t.Helper()
	server := miniredis.RunT(t)
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	t.Cleanup(func() { _ = rdb.Close() })
	cache := apikey.NewCache(rdb, make([]byte, 32), nil)
	provider := metric.NewMeterProvider(metric.WithReader(reader))
	observe, err := otel.Observe(provider, cache)
	if err != nil {
		t.Fatal(err)
	}
	s := &service{store: apikeytest.NewStore(), spans: tracetest.NewSpanRecorder()}
	s.trace = trace.NewTracerProvider(trace.WithSpanProcessor(s.spans))
	s.auth = apikey.New(s.store, s.store, &apikey.Options{Cache: cache, Observe: observe})
	return s
}

// ask sends a request in a span of its own, and returns the span's attributes.
func (s *service) ask(authorization string) map[attribute.Key]string {
	ctx, span := s.trace.Tracer("test").Start(context.Background(), "request")
	r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	s.auth.Handler(http.NotFoundHandler()).ServeHTTP(httptest.NewRecorder(), r)
	span.End()
	ended := s.spans.Ended()
	attributes := map[attribute.Key]string{}
	for _, a := range ended[len(ended)-1].Attributes() {
		attributes[a.Key] = a.Value.AsString()
	}
	return attributes
}

// everything asks for each outcome there is, and checks the spans.
func (s *service) everything(t *testing.T) {
	t.Helper()
	s.store.Subscribe("org_1", apikeytest.Paid())
	id, good := s.store.Create("org_1", admin.NewKey{})
	unpaidID, unpaid := s.store.Create("org_2", admin.NewKey{})
	for _, c := range []struct {
		authorization string
		want          map[attribute.Key]string
	}{
		{"", map[attribute.Key]string{"error.type": "AUTHORIZATION_HEADER_MISSING"}},
		{"Bearer " + good, map[attribute.Key]string{"enduser.id": "org_1", "apikey.key.id": id, "apikey.source": "store"}},
		{"Bearer " + good, map[attribute.Key]string{"enduser.id": "org_1", "apikey.key.id": id, "apikey.source": "memory"}},
		{"Bearer something-made-up", map[attribute.Key]string{"error.type": "INVALID_API_KEY", "apikey.source": "store"}},
		{"Bearer " + unpaid, map[attribute.Key]string{
			"error.type": "PLAN_EXPIRED", "enduser.id": "org_2", "apikey.key.id": unpaidID, "apikey.source": "store",
		}},
	} {
		if got := s.ask(c.authorization); !maps.Equal(got, c.want) {
			t.Errorf("the span has %v, want %v", got, c.want)
		}
	}
	s.store.Fail(errors.New("away"))
	if got := s.ask("Bearer another-made-up-key"); got["error.type"] != "SERVICE_UNAVAILABLE" {
		t.Errorf("the span has %v", got)
	}
}

// TestMetrics: what is recorded of each decision, and of the cache.
func TestMetrics(t *testing.T) {
	reader := metric.NewManualReader()
	newService(t, reader).everything(t)
	var all metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &all); err != nil {
		t.Fatal(err)
	}
	decisions := map[string]uint64{} // by error.type and source
	values := map[string]int64{}
	for _, m := range all.ScopeMetrics[0].Metrics {
		switch data := m.Data.(type) {
		case metricdata.Histogram[float64]:
			if m.Name != "apikey.decision.duration" || m.Unit != "s" {
				t.Errorf("a histogram %s in %s", m.Name, m.Unit)
			}
			for _, p := range data.DataPoints {
				code, _ := p.Attributes.Value("error.type")
				source, _ := p.Attributes.Value("apikey.source")
				decisions[code.AsString()+" "+source.AsString()] += p.Count
				if p.Sum <= 0 || p.Sum > 10 {
					t.Errorf("%v took %v s", p.Attributes, p.Sum)
				}
			}
		case metricdata.Sum[int64]:
			values[m.Name] = data.DataPoints[0].Value
		case metricdata.Gauge[int64]:
			values[m.Name] = data.DataPoints[0].Value
		}
	}
	want := map[string]uint64{
		"AUTHORIZATION_HEADER_MISSING ": 1, " store": 1, " memory": 1, "INVALID_API_KEY store": 1, "PLAN_EXPIRED store": 1, "SERVICE_UNAVAILABLE ": 1,
	}
	if !maps.Equal(decisions, want) {
		t.Errorf("decisions %v, want %v", decisions, want)
	}
	if values["apikey.store.reads"] != 6 || values["apikey.store.errors"] != 1 || values["apikey.redis.misses"] != 6 || len(values) != 21 {
		t.Errorf("%d statistics: %v", len(values), values)
	}
}

// TestWithoutCache: the cache and the span may be missing.
func TestWithoutCache(t *testing.T) {
	observe, err := otel.Observe(metric.NewMeterProvider(), nil)
	if err != nil {
		t.Fatal(err)
	}
	observe(t.Context(), apikey.Decision{Code: "X"})
}

// TestDashboard: every query of the dashboard is over metrics that there are.
func TestDashboard(t *testing.T) {
	registry := promclient.NewRegistry()
	exporter, err := prometheus.New(prometheus.WithRegisterer(registry))
	if err != nil {
		t.Fatal(err)
	}
	newService(t, exporter).everything(t)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	labels := map[string]bool{"le": true}
	for _, f := range families {
		names = append(names, f.GetName(), f.GetName()+"_bucket", f.GetName()+"_count", f.GetName()+"_sum")
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = true
			}
		}
	}

	text, err := os.ReadFile("grafana.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	queries, used := 0, map[string]bool{}
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			queries++
			found := regexp.MustCompile(`\bapikey_\w+`).FindAllString(regexp.MustCompile(`by \([^)]*\)`).ReplaceAllString(target.Expr, ""), -1)
			if len(found) == 0 {
				t.Errorf("%s: %s is over nothing of ours", p.Title, target.Expr)
			}
			for _, name := range found {
				used[name] = true
				if !slices.Contains(names, name) {
					t.Errorf("%s: there is no metric %s", p.Title, name)
				}
			}
			for _, by := range regexp.MustCompile(`by \(([^)]*)\)`).FindAllStringSubmatch(target.Expr, -1) {
				if !labels[by[1]] {
					t.Errorf("%s: there is no label %s", p.Title, by[1])
				}
			}
		}
	}
	if queries < 15 {
		t.Errorf("%d queries", queries)
	}
	for _, f := range families { // and every metric is drawn
		name := f.GetName()
		if strings.HasPrefix(name, "apikey_") && !used[name] && !used[name+"_count"] {
			t.Errorf("no panel draws %s", name)
		}
	}
}
