// Package systemtest tests the whole: replicas of a service on real servers that fail, and
// the documents. README.md says which test shows what.
package systemtest

import (
	"log"
	"os"
	"testing"

	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) {
	if err := os.Chdir(".."); err != nil { // to where the documents are
		log.Fatal(err)
	}
	os.Exit(testservers.Main(m))
}
