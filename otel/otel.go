// Package otel reports the decisions of an apikey.Middleware and the statistics of its cache
// as OpenTelemetry metrics and span attributes. grafana.json is a dashboard for them.
//
//	observe, err := otel.Observe(provider, cache)
//	auth := apikey.New(keys, plans, &apikey.Options{Cache: cache, Observe: observe})
//
// The metrics:
//
//	apikey.decision.duration   histogram, s; error.type is the code of a refusal, apikey.source where the facts were found
//	apikey.redis.*             counters: hits, misses, rejected, errors, skipped, gets, batches
//	apikey.store.*             counters: reads, batches, errors, skipped, busy
//	apikey.store.abandoned     gauge: lookups that a store has not returned from
//	apikey.queue.*             counters: full, timeouts
//	apikey.stale.uses          counter
//	apikey.feed.live           gauge: 1 while announcements are known to arrive, else 0
//	apikey.feed.*              counters: announcements, unannounced, forged, unknown
//
// Metrics have no attributes for organisations and keys. Spans do.
package otel

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/trackpilots/apikey"
)

const scope = "github.com/trackpilots/apikey/otel"

// The attributes for which there is no semantic convention.
const (
	SourceKey = attribute.Key("apikey.source") // memory, redis, store or stale
	KeyIDKey  = attribute.Key("apikey.key.id") // on spans only
)

// Observe returns a function for Options.Observe that records every decision with the meter
// of a provider, and sets attributes of the span in the request's context: error.type,
// enduser.id (the organisation), apikey.key.id and apikey.source. It also registers the
// statistics of cache, unless that is nil. It returns the provider's errors.
func Observe(provider metric.MeterProvider, cache *apikey.Cache) (func(context.Context, apikey.Decision), error) {
	meter := provider.Meter(scope)
	duration, err := meter.Float64Histogram("apikey.decision.duration", metric.WithUnit("s"),
		metric.WithDescription("How long it took to admit or refuse a request."),
		metric.WithExplicitBucketBoundaries(1e-6, 2e-6, 5e-6, 1e-5, 1e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 1e-1, 2.5e-1, 5e-1, 1, 2.5))
	if err != nil {
		return nil, err
	}
	if cache != nil {
		if err := register(meter, cache); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context, d apikey.Decision) {
		attributes := make([]attribute.KeyValue, 0, 4)
		if d.Code != "" {
			attributes = append(attributes, semconv.ErrorTypeKey.String(d.Code))
		}
		if d.Source != "" {
			attributes = append(attributes, SourceKey.String(string(d.Source)))
		}
		duration.Record(ctx, d.Duration.Seconds(), metric.WithAttributeSet(attribute.NewSet(attributes...)))
		if span := trace.SpanFromContext(ctx); span.IsRecording() {
			if d.OrgID != "" {
				attributes = append(attributes, semconv.EnduserID(d.OrgID))
			}
			if d.KeyID != "" {
				attributes = append(attributes, KeyIDKey.String(d.KeyID))
			}
			span.SetAttributes(attributes...)
		}
	}, nil
}

// register registers the statistics of a cache.
func register(meter metric.Meter, cache *apikey.Cache) error {
	counters := []struct {
		name, unit, description string
		value                   func(apikey.CacheStats) uint64
	}{
		{"apikey.redis.hits", "{record}", "Answered by a record in Redis.", func(s apikey.CacheStats) uint64 { return s.RedisHits }},
		{"apikey.redis.misses", "{record}", "No record in Redis that may be used.", func(s apikey.CacheStats) uint64 { return s.RedisMisses }},
		{"apikey.redis.rejected", "{record}", "Records in Redis that were not sealed by us.", func(s apikey.CacheStats) uint64 { return s.RedisRejected }},
		{"apikey.redis.errors", "{command}", "GET or SET that failed or took too long.", func(s apikey.CacheStats) uint64 { return s.RedisErrors }},
		{"apikey.redis.skipped", "{command}", "GET or SET that were not sent, since Redis had failed.", func(s apikey.CacheStats) uint64 { return s.RedisSkipped }},
		{"apikey.redis.gets", "{command}", "GETs that were sent.", func(s apikey.CacheStats) uint64 { return s.RedisGets }},
		{"apikey.redis.batches", "{batch}", "Round trips that they took.", func(s apikey.CacheStats) uint64 { return s.RedisBatches }},
		{"apikey.store.reads", "{lookup}", "Keys and plans that stores were asked for.", func(s apikey.CacheStats) uint64 { return s.StoreReads }},
		{"apikey.store.batches", "{batch}", "Round trips that they took.", func(s apikey.CacheStats) uint64 { return s.StoreBatches }},
		{"apikey.store.busy", "{lookup}", "Lookups for which all connections of the pool were in use.", func(s apikey.CacheStats) uint64 { return s.StoreBusy }},
		{"apikey.queue.full", "{lookup}", "Lookups that were not made, since too many others waited.", func(s apikey.CacheStats) uint64 { return s.QueueFull }},
		{"apikey.queue.timeouts", "{lookup}", "Lookups that waited for too long while others were answered.", func(s apikey.CacheStats) uint64 { return s.QueueTimeouts }},
		{"apikey.store.errors", "{lookup}", "Lookups that could not be made.", func(s apikey.CacheStats) uint64 { return s.StoreErrors }},
		{"apikey.store.skipped", "{lookup}", "Lookups that were not made, since the store had failed.", func(s apikey.CacheStats) uint64 { return s.StoreSkipped }},
		{"apikey.stale.uses", "{use}", "Admitted on facts past their time, since the store could not be read.", func(s apikey.CacheStats) uint64 { return s.StaleUses }},
		{"apikey.feed.announcements", "{change}", "Changes that were announced.", func(s apikey.CacheStats) uint64 { return s.Announcements }},
		{"apikey.feed.unannounced", "{change}", "Changes that should have been announced and were not.", func(s apikey.CacheStats) uint64 { return s.Unannounced }},
		{"apikey.feed.forged", "{announcement}", "Announcements of transactions that do not exist.", func(s apikey.CacheStats) uint64 { return s.Forged }},
		{"apikey.feed.unknown", "{announcement}", "Announcements of kinds that this version does not know.", func(s apikey.CacheStats) uint64 { return s.Unknown }},
	}
	live, err := meter.Int64ObservableGauge("apikey.feed.live", metric.WithUnit("1"),
		metric.WithDescription("Whether announcements are known to arrive."))
	if err != nil {
		return err
	}
	abandoned, err := meter.Int64ObservableGauge("apikey.store.abandoned", metric.WithUnit("{lookup}"),
		metric.WithDescription("Lookups under way in stores that have not returned although their time is over."))
	if err != nil {
		return err
	}
	instruments := []metric.Observable{live, abandoned}
	observables := make([]metric.Int64Observable, len(counters))
	for i, c := range counters {
		if observables[i], err = meter.Int64ObservableCounter(c.name, metric.WithUnit(c.unit), metric.WithDescription(c.description)); err != nil {
			return err
		}
		instruments = append(instruments, observables[i])
	}
	_, err = meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		stats := cache.Stats()
		for i, c := range counters {
			o.ObserveInt64(observables[i], int64(c.value(stats)))
		}
		var isLive int64
		if stats.FeedLive {
			isLive = 1
		}
		o.ObserveInt64(live, isLive)
		o.ObserveInt64(abandoned, int64(stats.StoreAbandoned))
		return nil
	}, instruments...)
	return err
}
