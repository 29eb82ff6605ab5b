// Copyright: Contributors to the homelab.inference project
// GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later

// What gguf-parser-go says of the cases on standard input, one JSON object a line; one line of answer for each.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	parser "github.com/gpustack/gguf-parser-go"
)

type question struct {
	Path     string
	Context  int32
	Batch    int32
	Ubatch   int32
	Parallel int32
	Flash    bool
	Key      string
	Value    string
	Layers   uint64
	Split    []float64 // running sum, 1 at last; empty for the processor alone
}

var types = map[string]parser.GGMLType{
	"f16": parser.GGMLTypeF16, "q8_0": parser.GGMLTypeQ8_0, "q4_0": parser.GGMLTypeQ4_0,
}

func main() {
	out := json.NewEncoder(os.Stdout)
	lines := bufio.NewScanner(os.Stdin)
	files := map[string]*parser.GGUFFile{}
	for lines.Scan() {
		var q question
		if err := json.Unmarshal([]byte(strings.TrimSpace(lines.Text())), &q); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		file, known := files[q.Path]
		if !known {
			var err error
			if file, err = parser.ParseGGUFFile(q.Path, parser.SkipLargeMetadata()); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			files[q.Path] = file
		}
		options := []parser.GGUFRunEstimateOption{
			parser.WithLLaMACppContextSize(q.Context),
			parser.WithLLaMACppLogicalBatchSize(q.Batch),
			parser.WithLLaMACppPhysicalBatchSize(q.Ubatch),
			parser.WithParallelSize(q.Parallel),
			parser.WithLLaMACppCacheKeyType(types[q.Key]),
			parser.WithLLaMACppCacheValueType(types[q.Value]),
			parser.WithLLaMACppOffloadLayers(q.Layers),
		}
		if q.Flash {
			options = append(options, parser.WithFlashAttention())
		}
		if len(q.Split) > 1 {
			options = append(options, parser.WithTensorSplitFraction(q.Split))
		}
		answer := []map[string]uint64{}
		for _, device := range file.EstimateLLaMACppRun(options...).Devices {
			answer = append(answer, map[string]uint64{
				"weights": uint64(device.Weight.Sum()),
				"kv":      uint64(device.KVCache.Sum()),
				"compute": uint64(device.Computation.Sum()),
			})
		}
		if err := out.Encode(answer); err != nil {
			os.Exit(1)
		}
	}
}
