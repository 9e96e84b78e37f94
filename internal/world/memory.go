package world

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/keyformat"
)

// Memory is a world without servers.
type Memory struct {
	mu       sync.Mutex
	enrolled int
	KeyRows  map[apikey.KeyHash]apikey.Key
	PlanRows map[string]apikey.Plan
	Err      error // the answer to everything, if not nil
	reads    int
}

// NewMemory returns an empty world.
func NewMemory() *Memory {
	return &Memory{KeyRows: map[apikey.KeyHash]apikey.Key{}, PlanRows: map[string]apikey.Plan{}}
}

// Key implements [apikey.KeyStore].
func (w *Memory) Key(_ context.Context, h apikey.KeyHash) (apikey.Key, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reads++
	return lookup(w.KeyRows, h, w.Err)
}

// Plan implements [apikey.PlanStore].
func (w *Memory) Plan(_ context.Context, orgID string) (apikey.Plan, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reads++
	return lookup(w.PlanRows, orgID, w.Err)
}

// Enrol implements [World].
func (w *Memory) Enrol(_ testing.TB, k KeyState, p PlanState) (string, apikey.Org) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.enrolled++
	apiKey := keyformat.New(keyformat.Test)
	org := apikey.Org{ID: fmt.Sprintf("org_%d", w.enrolled), KeyID: fmt.Sprintf("key_%d", w.enrolled)}
	key := apikey.Key{ID: org.KeyID, OrgID: org.ID, Active: true}
	switch k {
	case Expired:
		key.ExpiresAt = time.Now().Add(-24 * time.Hour)
	case Unexpired:
		key.ExpiresAt = time.Now().Add(24 * time.Hour)
	case Deactivated:
		key.Active = false
	}
	if k != Unknown && k != Deleted && k != OrgDeleted {
		w.KeyRows[apikey.HashKey(apiKey)] = key
	}
	if plan, ok := PlanFacts()[p]; ok && k != OrgDeleted {
		w.PlanRows[org.ID], org.Plan = plan, plan
	}
	return apiKey, org
}

// Set changes the world under its lock.
func (w *Memory) Set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

// ReadCount returns how many lookups there were.
func (w *Memory) ReadCount() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reads
}

func lookup[K comparable, V any](m map[K]V, k K, err error) (V, error) {
	v, ok := m[k]
	if err == nil && !ok {
		err = apikey.ErrNotFound
	}
	return v, err
}
