# Everything a newcomer needs: make demo, make test. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_SOURCE := resnet18 --num-classes 10 --input x:float32:batchx3x32x32

.PHONY: install demo table test test-full lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/install.sh
	touch $(STAMP)

demo: install
	@test -f demo/digits.safetensors || $(BIN)/deploykit finetune $(DEMO_SOURCE) --weights none --data digits \
		--epochs 4 --seconds 40 -o demo/digits.safetensors
	@$(BIN)/deploykit run $(DEMO_SOURCE) --weights demo/digits.safetensors --data digits \
		--backend torch,onnxruntime,openvino,tensorrt-rtx --method minmax \
		--batch 1 -o demo/report

# The seeds' table: ResNet-18 at 224x224, batch 1 and 8, every row that this machine can run.
table: install
	$(BIN)/deploykit bench resnet18 --weights none --data random:64 --batch 1,8 --reference-table \
		--markdown table/table.md --json table/table.json --html table/table.html

test: install
	$(BIN)/ruff check deploykit tests benchmarks examples scripts
	$(BIN)/ruff format --check deploykit tests benchmarks examples scripts
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

test-full: install
	$(BIN)/pytest -m "not gpu"

clean:
	rm -rf $(VENV) demo table build *.egg-info
