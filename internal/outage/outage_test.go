package outage_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/trackpilots/apikey/internal/outage"
)

// TestStates: what each SQLSTATE that a lookup can get means. Those of real servers are in
// package pg.
func TestStates(t *testing.T) {
	for class, codes := range map[outage.Class][]string{
		outage.Away: {
			"08000", "08001", "08003", "08004", "08006", "08P01", "57P01", "57P02", "57P03", "57P04", "57P05",
			"3D000", "58000", "58030", "58P01", "XX001", "XX002",
		},
		outage.Busy: {
			"53000", "53100", "53200", "53300", "53400", "57014", "55P03", "55006", "40001", "40P01", "25P04",
		},
		outage.Ours: {
			"0A000", "26000", "42P05", "42P01", "42703", "42883", "42601", "22021", "22P02", "25006", "25P02", "25P03",
			"54000", "54001", "57000", "XX000", "P0001", "HV000", "55000", "", "9",
		},
		outage.NotAllowed: {"42501", "28000", "28P01"},
	} {
		for _, code := range codes {
			err := fmt.Errorf("reading: %w", &pgconn.PgError{Code: code, Message: "no"})
			if got := outage.Of(err); got != class {
				t.Errorf("%s is %v, want %v", code, got, class)
			}
			if got := outage.IsAway(err); got != (class == outage.Away) {
				t.Errorf("%s is an outage: %v", code, got)
			}
		}
	}
}

// TestErrors: what errors without a SQLSTATE mean.
func TestErrors(t *testing.T) {
	refused := &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	tooMany := &pgconn.PgError{Code: "53300"}
	for name, c := range map[string]struct {
		err  error
		want outage.Class
	}{
		"any error of a user's store":       {errors.New("no"), outage.Away},
		"refused":                           {refused, outage.Away},
		"the connection broke":              {io.ErrUnexpectedEOF, outage.Away},
		"the connection is closed":          {fmt.Errorf("reading: %w", pgconn.ErrConnClosed), outage.Away},
		"silence":                           {context.DeadlineExceeded, outage.Away},
		"cancelled by somebody":             {context.Canceled, outage.Away},
		"its class before what it wraps":    {outage.As(outage.Busy, context.DeadlineExceeded), outage.Busy},
		"its class, wrapped":                {fmt.Errorf("reading: %w", outage.New(outage.NotAllowed, "no")), outage.NotAllowed},
		"the first class of two":            {outage.As(outage.Away, outage.New(outage.Busy, "no")), outage.Away},
		"one of several hosts has answered": {errors.Join(refused, tooMany), outage.Busy},
		"pooler: its queue":                 {&pgconn.PgError{Code: "08P01", Message: "query_wait_timeout"}, outage.Busy},
		"pooler: its limit":                 {&pgconn.PgError{Code: "08P01", Message: "no more connections allowed (max_client_conn)"}, outage.Busy},
		"pooler: no server":                 {&pgconn.PgError{Code: "08P01", Message: "server login has been failing, try again later (server_login_retry)"}, outage.Away},
		"these words by another code":       {&pgconn.PgError{Code: "42P01", Message: "query_wait_timeout"}, outage.Ours},
		"a row that cannot be read":         {pgx.ScanArgError{Err: errors.New("no")}, outage.Ours},
		"no descriptors here":               {fmt.Errorf("dial: %w", &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", syscall.EMFILE)}), outage.Busy},
		"a local server's queue is full":    {&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EAGAIN)}, outage.Busy},
		"a transaction that has ended":      {fmt.Errorf("reading: %w", pgx.ErrTxClosed), outage.Ours},
	} {
		if got := outage.Of(c.err); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if outage.IsAway(nil) {
		t.Error("no error is an outage")
	}
	if err := outage.As(outage.Busy, context.DeadlineExceeded); !errors.Is(err, context.DeadlineExceeded) || err.Error() != context.DeadlineExceeded.Error() {
		t.Errorf("with a class it is %v", err)
	}
	for class, want := range map[outage.Class]string{outage.Away: "away", outage.Busy: "busy", outage.Ours: "ours", outage.NotAllowed: "not allowed"} {
		if class.String() != want {
			t.Errorf("%d is called %v", class, class)
		}
	}
}
