package apikeytest

import "github.com/trackpilots/apikey"

// What the suites need of a Store, and tests of services do not.

func Put(s *Store, h apikey.KeyHash, k apikey.Key) (id string) { return s.put(h, k) }

func Remove(s *Store, h apikey.KeyHash) { s.Delete(s.keys[h].ID) }
