// Package localserver starts servers from the binaries that are installed on this machine,
// for tests and for the demo. Each has a temporary directory of its own, and is stopped when
// the process that has started it ends, even if that is killed.
package localserver
