import http.server
import os
import subprocess
import sys
import threading
import time

import pytest

from minrl.data.minari_source import load_dataset
from minrl.errors import DatasetError

LOAD = """
import sys
from minrl.data import download, minari_source
download._PROBE_SECONDS = float(sys.argv[2])
minari_source.load_dataset(sys.argv[1])
"""


def load_in_new_process(dataset_id, root, probe_seconds=8, **environment):
    """Load with the environment's switches read afresh; return the last line of the error."""
    environment = os.environ | {"MINARI_DATASETS_PATH": str(root)} | environment
    environment.pop("HF_HUB_OFFLINE", None)
    begin = time.perf_counter()
    command = [sys.executable, "-c", LOAD, dataset_id, str(probe_seconds)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    return result.stderr.strip().rpartition("\n")[2], time.perf_counter() - begin


@pytest.fixture
def serve():
    """Return a function that starts a local server that answers every request in one way."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_switched_off_network_gives_one_message_with_the_embedded_alternative(root):
    with pytest.raises(DatasetError) as error:  # HF_HUB_OFFLINE is set for all tests
        load_dataset("mujoco/hopper/medium-v0")
    message = str(error.value)
    assert message.startswith("dataset mujoco/hopper/medium-v0 is not on this machine")
    assert "OfflineModeIsEnabled" in message
    assert message.endswith("use an embedded dataset such as minrl/hopper/medium-v0.")
    assert "\n" not in message


def test_unreachable_server_ends_in_seconds_with_one_message(root):
    message, seconds = load_in_new_process(
        "mujoco/walker2d/expert-v0", root, HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert message.startswith("minrl.errors.DatasetError: dataset mujoco/walker2d/expert-v0 is not")
    assert "the download failed (ConnectError" in message
    assert message.endswith("such as minrl/walker2d/medium-expert-v0.")
    assert seconds < 15  # measured 1 s; Minari alone takes 23 s and more


def test_server_that_never_answers_is_given_up(root, serve):
    message, seconds = load_in_new_process(
        "mujoco/hopper/expert-v0",
        root,
        probe_seconds=1,
        HF_ENDPOINT=serve(lambda handler: time.sleep(30)),
    )
    assert "the download failed (TimeoutError: no answer within 1 seconds)" in message
    assert seconds < 10


def test_unknown_name_is_said_to_be_unknown(root, serve):
    def not_found(handler):
        handler.send_response(404)
        handler.send_header("X-Error-Code", "RepoNotFound")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    message, _ = load_in_new_process("mujocco/hopper/expert-v0", root, HF_ENDPOINT=serve(not_found))
    assert "Minari's server has none of this name. Did you mean mujoco/hopper/expert-v0" in message
    assert list(root.iterdir()) == []


def test_server_that_fails_after_the_first_question_still_gives_a_dataset_error(root, serve):
    def forbidden_after_the_probe(handler):
        body = b'{"id": "farama-minari/mujoco", "_id": "1", "siblings": [], "tags": []}'
        probe = handler.path == "/api/datasets/farama-minari/mujoco"
        handler.send_response(200 if probe else 403)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    message, seconds = load_in_new_process(
        "mujoco/hopper/expert-v0", root, HF_ENDPOINT=serve(forbidden_after_the_probe)
    )
    assert "minrl.errors.DatasetError: dataset mujoco/hopper/expert-v0 is not" in message
    assert "the download failed (" in message
    assert seconds < 20


@pytest.mark.network
def test_a_dataset_comes_from_minaris_server(tmp_path):
    environment = os.environ | {"MINARI_DATASETS_PATH": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)  # the library reads it once, when it is imported
    program = (
        "from minrl import load_dataset\n"
        "episodes = load_dataset('mujoco/hopper/medium-v0')\n"
        "print(episodes.info.environment_id, episodes.num_steps)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["Hopper-v5", "999404"]  # as the dataset's card says
