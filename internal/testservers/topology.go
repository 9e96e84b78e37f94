package testservers

// Redis in the company of others: on TCP, as a cluster, and under a sentinel.

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/localserver"
)

// freePort returns a port of the loopback that nobody listens on.
func freePort(tb testing.TB) string {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer listener.Close()
	return strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
}

// StartRedisTCP starts a server of the test's own on the loopback, and returns its
// address too.
func StartRedisTCP(tb testing.TB, args ...string) (*Server, string) {
	tb.Helper()
	port := freePort(tb)
	s := StartRedis(tb, append([]string{"--bind", "127.0.0.1", "--port", port}, args...)...)
	return s, "127.0.0.1:" + port
}

// StartRedisTLS starts a server of the test's own on the loopback that takes TLS only and
// wants the password p, and returns its address too.
func StartRedisTLS(tb testing.TB, certFile, keyFile string) (*Server, string) {
	tb.Helper()
	port := freePort(tb)
	s := StartRedis(tb, "--bind", "127.0.0.1", "--tls-port", port, "--tls-cert-file", certFile, "--tls-key-file", keyFile,
		"--tls-auth-clients", "no", "--requirepass", "p")
	return s, "127.0.0.1:" + port
}

// StartRedisCluster starts a cluster of masters, among which the slots are shared
// out. Those whose masters are up are served when others are not.
func StartRedisCluster(tb testing.TB, masters int) (nodes []*Server, addrs []string) {
	tb.Helper()
	const slots = 16384
	var first string
	for i := range masters {
		bus := freePort(tb)
		node, addr := StartRedisTCP(tb, "--cluster-enabled", "yes", "--cluster-port", bus,
			"--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no")
		nodes, addrs = append(nodes, node), append(addrs, addr)
		rdb := RedisAt(tb, node.URL)
		do := func(args ...any) {
			if err := rdb.Do(tb.Context(), args...).Err(); err != nil {
				tb.Fatal(err)
			}
		}
		do("CLUSTER", "SET-CONFIG-EPOCH", i+1)
		do("CLUSTER", "ADDSLOTSRANGE", i*slots/masters, (i+1)*slots/masters-1)
		_, port, _ := net.SplitHostPort(addr)
		if first == "" {
			first = port + " " + bus
			continue
		}
		port, bus, _ = strings.Cut(first, " ")
		do("CLUSTER", "MEET", "127.0.0.1", port, bus)
	}
	for _, node := range nodes {
		rdb := RedisAt(tb, node.URL)
		await(tb, func(ctx context.Context) bool {
			info := rdb.ClusterInfo(ctx).Val()
			return strings.Contains(info, "cluster_state:ok") && strings.Contains(info, fmt.Sprintf("cluster_known_nodes:%d", masters)) &&
				strings.Contains(info, fmt.Sprintf("cluster_slots_ok:%d", slots))
		})
	}
	return nodes, addrs
}

// StartSentinel starts a sentinel that watches over a master by the name of
// "main", and returns its address. It fails over after half a second.
func StartSentinel(tb testing.TB, master string, replicas int) string {
	tb.Helper()
	dir, err := localserver.TempDir()
	if err != nil {
		tb.Fatal(err)
	}
	binary, err := localserver.Find("redis-server")
	if err != nil {
		tb.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(master)
	own := freePort(tb)
	config := filepath.Join(dir, "sentinel.conf") // which it also writes to
	err = os.WriteFile(config, fmt.Appendf(nil, `bind 127.0.0.1
port %s
dir %s
sentinel monitor main %s %s 1
sentinel down-after-milliseconds main 500
sentinel failover-timeout main 3000
`, own, dir, host, port), 0o644)
	if err == nil {
		err = localserver.Own(config)
	}
	if err != nil {
		tb.Fatal(err)
	}
	addr := "127.0.0.1:" + own
	start(tb, addr, dir, dial("tcp", addr), binary, config, "--sentinel")
	sentinel := redis.NewSentinelClient(&redis.Options{Addr: addr})
	defer sentinel.Close()
	await(tb, func(ctx context.Context) bool {
		known, err := sentinel.Replicas(ctx, "main").Result()
		return err == nil && len(known) == replicas
	})
	return addr
}

func await(tb testing.TB, condition func(context.Context) bool) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), startTimeout)
	defer cancel()
	for !condition(ctx) {
		select {
		case <-ctx.Done():
			tb.Fatal("testservers: a server is up, but not ready")
		case <-time.After(20 * time.Millisecond):
		}
	}
}
