package apikey_test

// The tests of each file stand beside it. Those of the whole are in systemtest, and what
// both run in is internal/world.

import (
	"os"
	"testing"

	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }
