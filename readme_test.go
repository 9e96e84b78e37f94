package apikey_test

// What the README says is true: its program compiles, its commands run, and the
// tests that it names are there.

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/testservers"
)

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	mustNot(t, err)
	return string(text)
}

func TestReadmeProgram(t *testing.T) {
	program := regexp.MustCompile("(?s)```go\n(package main.*?)```").FindStringSubmatch(readme(t))
	if program == nil {
		t.Fatal("the README has no program")
	}
	file := filepath.Join(t.TempDir(), "main.go")
	mustNot(t, os.WriteFile(file, []byte(program[1]), 0o600))
	if out, err := exec.Command("go", "vet", file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestReadmeCommands runs the block that begins with DATABASE_URL, on a database
// of the test's own.
func TestReadmeCommands(t *testing.T) {
	block := regexp.MustCompile(`(?m)^    export DATABASE_URL=\S+\n((?:    .+\n)+)`).FindStringSubmatch(readme(t))
	if block == nil || strings.Count(block[1], "\n") < 7 {
		t.Fatalf("the README has no commands: %q", block)
	}
	file := filepath.Join(t.TempDir(), "key")
	mustNot(t, os.WriteFile(file, []byte(keyformat.New(keyformat.Live)), 0o600))
	cmd := exec.Command("sh", "-ec", strings.ReplaceAll(block[1], "file-with-the-key", file))
	cmd.Env = append(os.Environ(), "DATABASE_URL="+testservers.EmptyPostgresURL(t), "REDIS_URL=")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "CI") || !strings.Contains(string(out), "INVALID_API_KEY") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestReadmeNames: each test that is said to show something exists.
func TestReadmeNames(t *testing.T) {
	var sources strings.Builder
	for _, pattern := range []string{"*_test.go", "*/*_test.go", "*/*/*_test.go"} {
		files, err := filepath.Glob(pattern)
		mustNot(t, err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			mustNot(t, err)
			sources.Write(text)
		}
	}
	names := regexp.MustCompile("`((?:Test|Fuzz)[A-Z]\\w+)`").FindAllStringSubmatch(readme(t), -1)
	if len(names) < 20 {
		t.Errorf("the README names %d tests only", len(names))
	}
	for _, name := range names {
		if !strings.Contains(sources.String(), "func "+name[1]+"(") {
			t.Errorf("there is no %s", name[1])
		}
	}
}

// TestReadmeScanner: the pattern for secret scanners finds keys, and no less.
func TestReadmeScanner(t *testing.T) {
	pattern := regexp.MustCompile("`(.btpk_.*)`").FindStringSubmatch(readme(t))
	if pattern == nil {
		t.Fatal("the README has no pattern for scanners")
	}
	scanner := regexp.MustCompile(pattern[1])
	for _, env := range []keyformat.Environment{keyformat.Live, keyformat.Test} {
		key := keyformat.New(env)
		if got := scanner.FindString(`{"key": "` + key + `"}`); got != key {
			t.Errorf("found %q in a line with %s", got, key)
		}
		if got := scanner.FindString(key + "0"); got != "" {
			t.Errorf("found %q in what is no key", got)
		}
	}
}
