import gc, pytest
from tests.test_cli import *
from tests.conftest import *
def test_a(caxev, mongod, tmp_path):
    test_wrong_password(caxev, mongod, tmp_path); gc.collect()
def test_b(caxev, mongod, tmp_path):
    test_not_a_replica_set(caxev, mongod, tmp_path); gc.collect()
def test_c(online, database):
    insert(database,1)
    online("status"); gc.collect()
def test_d(online, database):
    insert(database,1)
    online("listen","--site","lngs","--once"); gc.collect()
