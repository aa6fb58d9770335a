package cli_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// dumped is what dump --output=json prints of the parts that are compared.
type dumped struct {
	Header map[string]any
	L1     []map[string]any
	L2     []struct {
		Guest, Host, Kind, Error string
	}
	Refcounts []struct {
		Index, Clusters, Refcount int64
		Error                     string
	}
	Snapshots []struct{ ID, Name string }
	Bitmaps   []struct{ Name string }
}

// dump runs qimg dump --output=json.
func dump(t *testing.T, code int, args ...string) (d dumped) {
	t.Helper()
	r := run(t, append([]string{"dump", "--output=json"}, args...)...)
	if r.Code != code {
		t.Fatalf("%q: exit %d\n%s", args, r.Code, r.Stderr)
	}
	if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil {
		t.Fatalf("%q: %v\n%s", args, err, r.Stdout)
	}
	return d
}

func number(t *testing.T, s string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDump compares what the tables say with what qemu-img makes of them.
func TestDump(t *testing.T) {
	zoo(t)
	for _, file := range []string{"v3-default.qcow2", "v2-cs512.qcow2", "v3-cs2m.qcow2", "snap-40.qcow2", "v3-rb1.qcow2", "v3-rb64-cs512.qcow2", "bitmap-3.qcow2"} {
		d := dump(t, 0, "--what", "all", file)
		var extents []struct {
			Start, Length, Offset int64
			Data                  bool
		}
		if err := json.Unmarshal([]byte(oracle.MustRun(t, "qemu-img", "map", "--output=json", file)), &extents); err != nil {
			t.Fatal(err)
		}
		cluster := int64(1) << int64(d.Header["cluster_bits"].(float64))
		want, got := map[string]string{}, map[string]string{}
		for _, e := range extents {
			for at := int64(0); e.Data && at < e.Length; at += cluster {
				want[fmt.Sprintf("%#x", e.Start+at)] = fmt.Sprintf("%#x", e.Offset+at)
			}
		}
		for _, e := range d.L2 {
			if e.Kind == "data" {
				got[e.Guest] = e.Host
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: -qemu-img +dump\n%s", file, diff)
		}
		var info struct {
			Snapshots []struct{ ID, Name string }
			Specific  struct {
				Data struct{ Bitmaps []struct{ Name string } }
			} `json:"format-specific"`
		}
		if err := json.Unmarshal([]byte(oracle.MustRun(t, "qemu-img", "info", "--output=json", file)), &info); err != nil {
			t.Fatal(err)
		}
		if len(d.Snapshots)+len(info.Snapshots) > 0 {
			if diff := cmp.Diff(info.Snapshots, d.Snapshots); diff != "" {
				t.Errorf("%s: -qemu-img +dump\n%s", file, diff)
			}
		}
		if len(info.Specific.Data.Bitmaps) != len(d.Bitmaps) {
			t.Errorf("%s: bitmaps %v and %v", file, info.Specific.Data.Bitmaps, d.Bitmaps)
		}
		// A good image has the refcounts that its tables account for.
		var check struct {
			End int64 `json:"image-end-offset"`
		}
		if err := json.Unmarshal([]byte(oracle.MustRun(t, "qemu-img", "check", "--output=json", file)), &check); err != nil {
			t.Fatal(err)
		}
		last := d.Refcounts[len(d.Refcounts)-1]
		if end := (last.Index + last.Clusters) * cluster; end != check.End {
			t.Errorf("%s: refcounts end at %d, expected %d", file, end, check.End)
		}
	}
}

// TestDumpChoice: what is asked for, and nothing else.
func TestDumpChoice(t *testing.T) {
	zoo(t)
	// An image of 8 MiB with clusters of 64 KiB and a snapshot.
	d := dump(t, 0, "--what=l1,l2", "--guest-offset=1M", "--empty", "snap-1.qcow2")
	if len(d.L1) != 1 || len(d.L2) != 1 || number(t, d.L2[0].Guest) != 1<<20 || d.Header != nil || d.Refcounts != nil {
		t.Errorf("guest offset: %+v", d)
	}
	d = dump(t, 0, "--what=refcounts", "--host-offset=65536", "snap-1.qcow2")
	if len(d.Refcounts) != 1 || d.Refcounts[0].Index != 1 || d.Refcounts[0].Clusters != 1 {
		t.Errorf("host offset: %+v", d)
	}
	d = dump(t, 0, "--what=l2", "--entries=3-5", "--empty", "snap-1.qcow2")
	if len(d.L2) != 3 || number(t, d.L2[0].Guest) != 3<<16 {
		t.Errorf("entries: %+v", d)
	}
	active, snapshot := dump(t, 0, "--what=l1", "snap-1.qcow2"), dump(t, 0, "--what=l1", "-l", "one", "snap-1.qcow2")
	if active.L1[0]["l2-table"] == snapshot.L1[0]["l2-table"] {
		t.Error("the snapshot has the active L2 table")
	}
	for _, args := range [][]string{
		{"--what=x", "snap-1.qcow2"}, {"--entries=5-3", "snap-1.qcow2"}, {"--entries=x", "snap-1.qcow2"}, {"--guest-offset=x", "snap-1.qcow2"},
		{"-l", "none", "snap-1.qcow2"}, {"nope"}, {}, {"--output=xml", "snap-1.qcow2"}, {"chain-raw.base.raw"}, {"snap-1.qcow2", "snap-1.qcow2"},
	} {
		if r := run(t, append([]string{"dump"}, args...)...); r.Code != 1 || r.Stdout != "" || r.Stderr == "" {
			t.Errorf("%q: %+v", args, r)
		}
	}
}

// TestDumpDamaged: every image of the zoo has a dump, and the rest of an image
// goes on behind what cannot be read.
func TestDumpDamaged(t *testing.T) {
	files := zoo(t)
	for _, file := range files {
		for _, output := range []string{"human", "json"} {
			r := run(t, "dump", "--what=all", "--entries=0-1000", "--output="+output, file)
			if file == "hostile-cluster-bits-8.qcow2" || file == "hostile-cluster-bits-63.qcow2" || file == "hostile-version-4.qcow2" {
				if r.Code != 1 || r.Stdout != "" {
					t.Errorf("%s: %+v", file, r)
				}
				continue
			}
			failed := strings.Contains(r.Stdout, "error")
			if r.Stderr != "" || failed != (r.Code == 1) || r.Code > 1 || r.Stdout == "" {
				t.Errorf("%s: exit %d, %q", file, r.Code, r.Stderr)
			}
			if output == "json" && !json.Valid([]byte(r.Stdout)) {
				t.Errorf("%s: no JSON", file)
			}
		}
	}
	b, err := os.ReadFile("v3-default.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	b[0x30000+6] = 2 // the L2 table is not aligned
	b[0x10000+6] = 2 // nor is the refcount block
	writeFile(t, "damaged", string(b[:0x40000]))
	d := dump(t, 1, "--what=all", "damaged")
	if len(d.L1) != 1 || len(d.L2) != 1 || d.L2[0].Error == "" || len(d.Refcounts) != 1 || d.Refcounts[0].Error == "" {
		t.Errorf("%+v", d)
	}
}
