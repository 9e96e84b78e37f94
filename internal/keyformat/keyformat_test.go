package keyformat_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

var vectors = []string{
	"tpk_live_" + strings.Repeat("0", 43) + "2nd1uX",
	"tpk_test_" + strings.Repeat("0", 43) + "2N8BXp",
	"tpk_live_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefg1MAw3C",
}

func TestVectors(t *testing.T) {
	for _, key := range vectors {
		if !keyformat.Plausible(key) {
			t.Errorf("%s is refused", key)
		}
	}
}

// TestDamage: each way to get a key wrong by one character is found out.
func TestDamage(t *testing.T) {
	for _, key := range append(vectors, keyformat.New(keyformat.Live)) {
		const start = len("tpk_live_")
		for i := start; i < len(key); i++ {
			for _, c := range []byte("0Aaz-_~") {
				if damaged := key[:i] + string(c) + key[i+1:]; key[i] != c && keyformat.Plausible(damaged) {
					t.Errorf("%s passes for %s", damaged, key)
				}
			}
			if i > start && key[i] != key[i-1] {
				if swapped := key[:i-1] + key[i:i+1] + key[i-1:i] + key[i+1:]; keyformat.Plausible(swapped) {
					t.Errorf("%s passes for %s", swapped, key)
				}
			}
		}
		for _, damaged := range []string{key[:len(key)-1], key + "0", key[:start], key + "=", strings.ToLower(key), strings.ToUpper(key[start:])} {
			if strings.HasPrefix(damaged, key[:start]) && keyformat.Plausible(damaged) {
				t.Errorf("%s passes", damaged)
			}
		}
	}
}

// TestForeignKeys: keys issued elsewhere are not judged.
func TestForeignKeys(t *testing.T) {
	for _, key := range []string{
		"", "x", "sk_live_4eC39HqLyjWDarjtT1zdp7dc", "tpk", "tpk_", "tpk_live", "tpk_prod_1", "TPK_LIVE_1", "xtpk_live_1",
	} {
		if !keyformat.Plausible(key) {
			t.Errorf("%q is refused unread", key)
		}
	}
}

func TestNew(t *testing.T) {
	shape := map[keyformat.Environment]*regexp.Regexp{
		keyformat.Live: regexp.MustCompile(`^tpk_live_[0-9A-Za-z]{49}$`),
		keyformat.Test: regexp.MustCompile(`^tpk_test_[0-9A-Za-z]{49}$`),
	}
	seen := map[string]bool{}
	for env, want := range shape {
		for range 10_000 {
			key := keyformat.New(env)
			if !want.MatchString(key) || !keyformat.Plausible(key) {
				t.Fatalf("New(%s) = %s", env, key)
			}
			if seen[key] {
				t.Fatalf("%s was made twice", key)
			}
			seen[key] = true
		}
	}

	// Every character is as likely as any other: chi-square over the random part,
	// 61 degrees of freedom, exceeds 130 by chance less than once in a million runs.
	var counts [256]float64
	var n float64
	for key := range seen {
		for _, c := range []byte(key[9:52]) {
			counts[c]++
			n++
		}
	}
	var chi2 float64
	for _, c := range []byte("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") {
		d := counts[c] - n/62
		chi2 += d * d / (n / 62)
	}
	if chi2 > 130 {
		t.Errorf("chi-square of the characters is %.1f", chi2)
	}
}

func TestPlausibleDoesNotAllocate(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { keyformat.Plausible(vectors[0]) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
