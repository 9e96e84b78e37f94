package examples

// Compressors around the middleware: clients read refusals all the same.

import (
	"compress/gzip"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	gingzip "github.com/gin-contrib/gzip"
	"github.com/gin-gonic/gin"
	chimiddleware "github.com/go-chi/chi/v5/middleware"
	"github.com/gorilla/handlers"
	"github.com/klauspost/compress/gzhttp"
	echov4 "github.com/labstack/echo/v4"
	echov4middleware "github.com/labstack/echo/v4/middleware"
	"github.com/labstack/echo/v5"
	"github.com/labstack/echo/v5/middleware"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/apikeyclient"
)

// compressors put a compressor around a handler.
func compressors() map[string]func(http.Handler) http.Handler {
	return map[string]func(http.Handler) http.Handler{
		"gorilla": handlers.CompressHandler,
		"chi":     chimiddleware.Compress(5),
		"klauspost": func(h http.Handler) http.Handler {
			wrap, err := gzhttp.NewWrapper(gzhttp.MinSize(1))
			if err != nil {
				panic(err)
			}
			return wrap(h)
		},
		"echo": func(h http.Handler) http.Handler {
			e := echo.New()
			e.Use(middleware.Gzip())
			e.Any("/*", echo.WrapHandler(h))
			return e
		},
		"echo v4": func(h http.Handler) http.Handler {
			e := echov4.New()
			e.Use(echov4middleware.Gzip())
			e.Any("/*", echov4.WrapHandler(h))
			return e
		},
		"gin": func(h http.Handler) http.Handler {
			gin.SetMode(gin.ReleaseMode)
			e := gin.New()
			e.Use(gingzip.Gzip(gingzip.DefaultCompression))
			e.Any("/*path", gin.WrapH(h))
			return e
		},
	}
}

// TestCompressors sends the requests through compressors, from clients that take gzip
// and from those that do not, and reads the answers as these do.
func TestCompressors(t *testing.T) {
	for name, compress := range compressors() {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			server := httptest.NewServer(compress(netHTTP(apikey.New(w, w, nil))))
			defer server.Close()
			for header, want := range map[string]string{
				"": "AUTHORIZATION_HEADER_MISSING", "Token x": "INVALID_API_KEY_SCHEMA", "Bearer": "API_KEY_MISSING", "Bearer some-other-key-entirely": "INVALID_API_KEY",
				"Bearer " + w.dead: "INVALID_API_KEY", "Bearer " + w.unpaid: "PLAN_EXPIRED", "Bearer " + w.good: "",
			} {
				for _, method := range []string{http.MethodGet, http.MethodHead} {
					for _, encoding := range []string{"gzip", "identity"} {
						resp := sendAccepting(t, server, method, header, encoding)
						err := apikeyclient.FromResponse(resp)
						resp.Body.Close()
						switch {
						case method == http.MethodHead:
							if resp.StatusCode != 200 && resp.StatusCode != 401 {
								t.Errorf("HEAD %q, %s: status %d", header, encoding, resp.StatusCode)
							}
						case want == "" && err != nil, want != "" && codeOf(err) != want:
							t.Errorf("%q, %s: %v, want %q; headers %v", header, encoding, err, want, resp.Header)
						}
					}
				}
			}
		})
	}
}

// sendAccepting sends a request and decodes the body of the answer as its
// Content-Encoding has it.
func sendAccepting(t *testing.T, server *httptest.Server, method, authorization, encoding string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, server.URL+"/v1/whoami", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Accept-Encoding", encoding)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	resp, err := server.Client().Do(r)
	if err != nil {
		t.Fatalf("%s %q, %s: %v", method, authorization, encoding, err)
	}
	if method == http.MethodGet && resp.Header.Get("Content-Encoding") == "gzip" {
		body, err := gzip.NewReader(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body = struct {
			io.Reader
			io.Closer
		}{body, resp.Body}
	}
	return resp
}

// codeOf returns the code of an error of the API, "" of others.
func codeOf(err error) string {
	if e, ok := errors.AsType[*apikeyclient.Error](err); ok {
		return e.Code
	}
	return ""
}
