package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trackpilots/apikey/internal/contract"
	"github.com/trackpilots/apikey/internal/testservers"
)

// binary is the command, built as users build it.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "apikey-command")
	if err == nil {
		binary = filepath.Join(dir, "apikey")
		var out []byte
		if out, err = exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := testservers.Main(m)
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// A runningDemo is a demo and what it printed.
type runningDemo struct {
	cmd    *exec.Cmd
	url    string
	lines  []exampleLine
	stderr *bytes.Buffer
}

// An exampleLine is what the demo prints of one example.
type exampleLine struct{ about, want, curl string }

// examples is how many of them the demo prints.
const examples = 14

// startDemo starts a demo on a free port and reads its examples.
func startDemo(t *testing.T, args ...string) *runningDemo {
	t.Helper()
	d := &runningDemo{stderr: new(bytes.Buffer)}
	d.cmd = exec.Command(binary, append([]string{"demo", "--addr", "127.0.0.1:0"}, args...)...)
	d.cmd.Env = append(os.Environ(), "DATABASE_URL=", "REDIS_URL=")
	d.cmd.Stderr = d.stderr
	stdout, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if d.cmd.ProcessState == nil {
			_ = d.cmd.Process.Kill()
			_ = d.cmd.Wait()
		}
	})
	scanner := bufio.NewScanner(stdout)
	for len(d.lines) < examples || d.lines[len(d.lines)-1].curl == "" {
		if !scanner.Scan() {
			t.Fatalf("the demo ended after %d examples: %v\n%s", len(d.lines), scanner.Err(), d.stderr)
		}
		line := scanner.Text()
		switch {
		case strings.HasPrefix(line, "listening on "):
			d.url, _, _ = strings.Cut(strings.TrimPrefix(line, "listening on "), ",")
		case strings.HasPrefix(line, "# "):
			i := strings.LastIndex(line, ": ")
			d.lines = append(d.lines, exampleLine{about: line[2:i], want: line[i+2:]})
		case strings.HasPrefix(line, "curl "):
			d.lines[len(d.lines)-1].curl = line
		}
	}
	return d
}

// interrupt is Ctrl-C.
func (d *runningDemo) interrupt(t *testing.T) {
	t.Helper()
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Wait(); err != nil || d.stderr.Len() > 0 {
		t.Errorf("after Ctrl-C: %v\n%s", err, d.stderr)
	}
}

// TestDemo runs the printed curl lines, without servers, with a temporary PostgreSQL and on
// servers that run, and ends the demo by Ctrl-C.
func TestDemo(t *testing.T) {
	t.Parallel()
	bodies := contract.Bodies(t)
	for name, args := range map[string][]string{"in memory": {"--in-memory"}, "temporary PostgreSQL": nil} {
		t.Run(name, func(t *testing.T) {
			d := startDemo(t, args...)
			d.checkCurl(t, bodies)
			d.interrupt(t)
		})
	}
	t.Run("servers", func(t *testing.T) {
		pool := testservers.Postgres(t)
		if _, err := pool.Exec(t.Context(), `INSERT INTO plan_catalogue VALUES ('mine', true);
			INSERT INTO org_plans (org_id, plan, status) VALUES ('mine', 'mine', 'active')`); err != nil {
			t.Fatal(err)
		}
		args := []string{"--database-url", pool.Config().ConnString(), "--redis-url", testservers.RedisURL(t)}
		first, second := startDemo(t, args...), startDemo(t, args...)
		first.checkCurl(t, bodies)
		first.interrupt(t)
		second.checkCurl(t, bodies) // the other demo still has its rows
		// What somebody does in psql takes effect, well before what is known grows old.
		if _, err := pool.Exec(t.Context(), `UPDATE org_plans SET status = 'expired' WHERE org_id = 'demo-paying'`); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			out, err := exec.Command("sh", "-c", second.lines[0].curl).Output()
			if err == nil && strings.HasSuffix(string(out), bodies["PLAN_EXPIRED"]) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("the plan has expired, and the answer is still %v\n%s", err, out)
			}
		}
		second.interrupt(t)

		var left []string
		err := pool.QueryRow(t.Context(), `SELECT array(
			SELECT 'key of ' || org_id FROM api_keys UNION ALL SELECT 'org ' || org_id FROM org_plans
			UNION ALL SELECT 'plan ' || name FROM plan_catalogue ORDER BY 1)`).Scan(&left)
		if want := []string{"org mine", "plan mine"}; err != nil || !slices.Equal(left, want) {
			t.Errorf("the database holds %q, %v, want %q", left, err, want)
		}
	})
	t.Run("environment", func(t *testing.T) {
		cmd := exec.Command(binary, "demo", "--addr", "127.0.0.1:0")
		cmd.Env = append(os.Environ(), "DATABASE_URL=postgres://u@127.0.0.1:1/db", "REDIS_URL=")
		wantFailure(t, cmd, 1, "no answer from PostgreSQL")
		cmd = exec.Command(binary, "demo", "--addr", "127.0.0.1:0")
		cmd.Env = append(os.Environ(), "DATABASE_URL=", "REDIS_URL=redis://127.0.0.1:1")
		wantFailure(t, cmd, 1, "no answer from Redis")
	})
}

// checkCurl runs the printed lines as they stand.
func (d *runningDemo) checkCurl(t *testing.T, bodies map[string]string) {
	t.Helper()
	seen := map[string]bool{}
	for _, line := range d.lines {
		seen[line.want] = true
		out, err := exec.Command("sh", "-c", strings.Replace(line.curl, "curl", "curl -sS", 1)).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", line.curl, err, out)
		}
		head, body, _ := strings.Cut(string(out), "\r\n\r\n")
		status := "HTTP/1.1 401 Unauthorized"
		switch {
		case line.want == "200":
			status = "HTTP/1.1 200 OK"
			if !strings.Contains(body, `"orgId":"demo-paying"`) {
				t.Errorf("%s: %s", line.about, body)
			}
		case body != bodies[line.want]:
			t.Errorf("%s: body\n%s, want\n%s", line.about, body, bodies[line.want])
		}
		if !strings.HasPrefix(head, status+"\r\n") {
			t.Errorf("%s: %s, want %s", line.about, head, status)
		}
	}
	for code := range bodies {
		if !seen[code] {
			t.Errorf("no example shows %s", code)
		}
	}
}

// TestDocumentedClient: the snippet that customers copy throws the documented
// errors.
func TestDocumentedClient(t *testing.T) {
	t.Parallel()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatal("node is not installed: 'make servers' installs it")
	}
	d := startDemo(t, "--in-memory")
	type request struct {
		Authorization *string `json:"authorization"`
	}
	const (
		misconfigured = "API key is not configured correctly in the request."
		invalid       = "Invalid or inactive API key. Check your credentials."
		expired       = "Trackpilots subscription expired. Please upgrade your plan."
	)
	documented := map[string]string{
		"AUTHORIZATION_HEADER_MISSING": misconfigured, "INVALID_API_KEY_SCHEMA": misconfigured, "API_KEY_MISSING": misconfigured,
		"INVALID_API_KEY": invalid, "PLAN_EXPIRED": expired, "200": "",
	}
	var requests []request
	for _, line := range d.lines {
		var r request
		if m := regexp.MustCompile(`'Authorization: (.*)'`).FindStringSubmatch(line.curl); m != nil {
			r.Authorization = &m[1]
		}
		requests = append(requests, r)
	}
	input, err := json.Marshal(requests)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(node, "testdata/client.mjs", "../../internal/contract/trackpilots-errors.txt", d.url)
	cmd.Stdin = bytes.NewReader(input)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var thrown []*string
	if err := json.Unmarshal(out, &thrown); err != nil || len(thrown) != len(requests) {
		t.Fatalf("%v: %s", err, out)
	}
	for i, line := range d.lines {
		got := ""
		if thrown[i] != nil {
			got = *thrown[i]
		}
		if want, ok := documented[line.want]; !ok || got != want {
			t.Errorf("%s (%s): throws %q, want %q", line.about, line.want, got, want)
		}
	}
	d.interrupt(t)
}

// wantFailure runs cmd and wants the status, and one line that says want.
func wantFailure(t *testing.T, cmd *exec.Cmd, status int, want string) (line string) {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() != status {
		t.Errorf("%v: %v, want exit status %d", cmd.Args, err, status)
	}
	line = stderr.String()
	if !strings.Contains(line, want) {
		t.Errorf("%v says\n%s, want %q in it", cmd.Args, line, want)
	}
	if status == 1 && (strings.Count(line, "\n") != 1 || !strings.HasPrefix(line, "apikey: ")) {
		t.Errorf("%v says\n%s, want one line", cmd.Args, line)
	}
	return line
}

func TestFaults(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, c := range map[string]struct {
		args   []string
		status int
		want   string
	}{
		"port taken":            {[]string{"demo", "--addr", taken.Addr().String()}, 1, "address already in use"},
		"bad address":           {[]string{"demo", "--addr", "nonsense"}, 1, "nonsense"},
		"PostgreSQL away":       {[]string{"demo", "--database-url", "postgres://u@127.0.0.1:1/db"}, 1, "no answer from PostgreSQL"},
		"bad PostgreSQL URL":    {[]string{"demo", "--database-url", "no url"}, 1, "the PostgreSQL URL cannot be parsed"},
		"Redis away":            {[]string{"demo", "--redis-url", "redis://127.0.0.1:1"}, 1, "no answer from Redis"},
		"Redis URL of http":     {[]string{"demo", "--redis-url", "http://127.0.0.1"}, 1, "the Redis URL cannot be parsed"},
		"bad Redis URL":         {[]string{"demo", "--redis-url", "redis://:hunter2@a b"}, 1, "the Redis URL cannot be parsed"},
		"no command":            {nil, 2, "usage: apikey"},
		"unknown command":       {[]string{"frobnicate"}, 2, "there is no such command"},
		"unknown flag":          {[]string{"demo", "--frobnicate"}, 2, "frobnicate"},
		"unexpected argument":   {[]string{"demo", "now"}, 2, "unexpected argument"},
		"password not repeated": {[]string{"demo", "--database-url", "postgres://u:hunter2@127.0.0.1:1/db"}, 1, "no answer from PostgreSQL"},
	} {
		t.Run(name, func(t *testing.T) {
			if i := slices.Index(c.args, "demo"); i >= 0 && !slices.Contains(c.args, "--addr") {
				c.args = slices.Insert(c.args, i+1, "--addr", "127.0.0.1:0")
			}
			cmd := exec.Command(binary, c.args...)
			cmd.Env = append(os.Environ(), "DATABASE_URL=", "REDIS_URL=")
			if line := wantFailure(t, cmd, c.status, c.want); strings.Contains(line, "hunter2") {
				t.Errorf("repeats a password:\n%s", line)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command(binary, "help").Output(); err != nil || string(out) != usage() {
		t.Errorf("help: %v\n%s", err, out)
	}
	if out, err := exec.Command(binary, "demo", "-h").CombinedOutput(); err != nil || !strings.Contains(string(out), "-database-url") {
		t.Errorf("demo -h: %v\n%s", err, out)
	}
}

// TestDialTLS: the connections of the demo's links are protected by TLS where the URL of
// Redis says so.
func TestDialTLS(t *testing.T) {
	t.Parallel()
	server := httptest.NewTLSServer(http.NotFoundHandler())
	defer server.Close()
	config := server.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	config.ServerName = "example.com" // for which the server has a certificate
	dial := through(new(net.Dialer).DialContext, config)
	conn, err := dial(t.Context(), "tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.0 404") {
		t.Errorf("answered %q, %v", answer, err)
	}
	if through(nil, config) != nil {
		t.Error("the client's own dialer is replaced")
	}
}
