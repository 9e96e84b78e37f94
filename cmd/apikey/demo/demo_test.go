package demo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// start runs a demo in memory, and returns where it listens and what it prints.
func start(t *testing.T, addr string) (url, printed string) {
	t.Helper()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	var out strings.Builder
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, Config{Listener: listener, InMemory: true, Out: &out}) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	url = "http://127.0.0.1:" + port
	resp, err := http.Get(url) // is answered once everything is printed
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return url, out.String()
}

// TestOtherSites: pages of other sites change nothing, whatever name they give to this
// machine. The API is for everybody.
func TestOtherSites(t *testing.T) {
	url, printed := start(t, "localhost:0")
	if !strings.Contains(printed, "on this machine only") {
		t.Errorf("it prints\n%s", printed)
	}
	for name, c := range map[string]struct {
		method, path, host string
		header             map[string]string
		status             int
	}{
		"own page":                {"POST", "/demo/change?action=deactivate", "", map[string]string{"Sec-Fetch-Site": "same-origin"}, 200},
		"another site":            {"POST", "/demo/change?action=deactivate", "", map[string]string{"Sec-Fetch-Site": "cross-site"}, 403},
		"another origin":          {"POST", "/demo/fault?part=redis&state=down", "", map[string]string{"Origin": "https://example.com"}, 403},
		"another name":            {"GET", "/", "example.com", nil, 403},
		"another name, events":    {"GET", "/demo/events", "example.com:8080", nil, 403},
		"another name, the API":   {"GET", "/v1/whoami", "example.com", nil, 401},
		"a GET that changes":      {"GET", "/demo/change?action=deactivate", "", nil, 405},
		"outside the page":        {"GET", "/page/index.html", "", nil, 404},
		"the API of nobody":       {"GET", "/outage/v1/whoami", "", map[string]string{"Authorization": "Bearer some-key-of-somebody"}, 503},
		"the page":                {"GET", "/", "localhost", nil, 200},
		"the page by its address": {"GET", "/", "127.0.0.1", nil, 200},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := http.NewRequestWithContext(t.Context(), c.method, url+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Host = cmp.Or(c.host, r.Host)
			for name, value := range c.header {
				r.Header.Set(name, value)
			}
			resp, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != c.status {
				t.Errorf("answered %d, want %d", resp.StatusCode, c.status)
			}
		})
	}
}

// TestWholeNetwork: who lets the whole network in is told so.
func TestWholeNetwork(t *testing.T) {
	if _, printed := start(t, ":0"); !strings.Contains(printed, "for the whole network") {
		t.Errorf("it prints\n%s", printed)
	}
}

// TestMistakes: what cannot be done is said.
func TestMistakes(t *testing.T) {
	url, _ := start(t, "localhost:0")
	for path, want := range map[string]string{
		"/demo/change?action=frobnicate":            "there is no such change",
		"/demo/choose?row=99":                       "there is no such key",
		"/demo/fault?part=redis&state=lost":         "there is no such part",
		"/demo/fault?part=printer&state=down":       "there is no such part",
		"/demo/fault?part=announcements&state=lost": "there are no announcements without PostgreSQL",
		"/demo/restart?replica=3":                   "there is no such replica",
		"/demo/restart?replica=A":                   "there is no such replica",
	} {
		resp, err := http.Post(url+path, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		var answer struct{ Error string }
		err = json.NewDecoder(resp.Body).Decode(&answer)
		resp.Body.Close()
		if err != nil || !strings.Contains(answer.Error, want) {
			t.Errorf("%s: %q, %v, want %q", path, answer.Error, err, want)
		}
	}
}

// TestSelfContained: the page asks no other host for anything.
func TestSelfContained(t *testing.T) {
	for _, name := range []string{"index.html", "demo.css", "demo.js"} {
		text, err := files.ReadFile("page/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if found := regexp.MustCompile(`(https?:)?//[a-z]+\.[a-z]+`).Find(text); found != nil {
			t.Errorf("%s names %s", name, found)
		}
	}
}

// TestServeDrains: a request that is under way when the end comes is answered.
func TestServeDrains(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	started, release := make(chan struct{}), make(chan struct{})
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(started)
		<-release
		_, _ = io.WriteString(w, "done")
	})}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, server, listener, func() {}) }()
	answer := make(chan string, 1)
	go func() {
		resp, err := http.Get("http://" + listener.Addr().String())
		if err != nil {
			answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		answer <- string(body)
	}()
	<-started
	cancel()
	for { // until it takes no more
		conn, err := net.Dial("tcp", listener.Addr().String())
		if errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
		if err == nil {
			_ = conn.Close()
		}
		time.Sleep(time.Millisecond)
	}
	close(release)
	if got := <-answer; got != "done" {
		t.Errorf("the request under way was answered %q", got)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
}
